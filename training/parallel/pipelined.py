"""Exact mode with a pipeline: a rank has consecutive parts of the model, and the bits are those of one process.

Microbatches are the replica's virtual workers. A chunk goes back through them in their order, in each schedule, so its
gradients are added up along the tree as everywhere, and then over the replicas of its stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.arithmetic.buffers import Buffers
from training.arithmetic.exact import BUCKET_BYTES, Bucket, Exchange, Group, plan_buckets, require_float32
from training.arithmetic.objective import Objective, recipe_errors
from training.arithmetic.reduce import places
from training.arithmetic.sparse import have_whole_gradients
from training.arithmetic.streams import set_streams, streams_now
from training.errors import UserError
from training.layout import Layout
from training.parallel.chunk import Chunk, as_values
from training.parallel.parts import Rest, Values, chunks_of, require_same_loss
from training.parallel.passing import Passing
from training.parallel.scatter import own_group
from training.parallel.schedule import Pass, Schedule, actions, chunks_per_rank
from training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class PipelineGroups:
    """This rank's: the stages of its replica, and the replicas of its stage."""

    stages: dist.ProcessGroup
    replicas: dist.ProcessGroup


def make_pipeline_groups(layout: Layout, rank: int, *, timeout: timedelta) -> PipelineGroups:
    """Collective over all ranks. A rank that is gone is noticed after `timeout` at the latest."""
    stages, replicas = (own_group(layout, dimension, rank, timeout=timeout) for dimension in ("pipeline", "data"))
    return PipelineGroups(stages=stages, replicas=replicas)


def require_pipeline(layout: Layout) -> None:
    """Raises `UserError` for one whose stages are not whole on a rank each."""
    if layout.pipeline < 2 or layout.shard > 1 or layout.tensor > 1:
        raise UserError(
            f"parallel: {layout}: a pipeline has two stages or more, and goes with data alone: set parallel.shard and"
            " parallel.tensor to 1"
        )


class Work(Protocol):
    """What a step is made of, for each virtual worker."""

    def seed(self, worker: int) -> None:
        """Its random streams, from their beginning."""
        ...

    def batch(self, worker: int) -> Mapping[str, Tensor]:
        """Of the first and the last stage, once of each worker, in their order."""
        ...

    def told(self, worker: int, maybe_loss: Tensor | None) -> Tensor:
        """What is summed over all virtual workers beside gradients: this stage's part of it, zeros for what others
        know. The last stage knows the loss."""
        ...


class Pipeline:
    """A model of which this rank computes every so-many-th chunk. It is whole until it is freed."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        *,
        layout: Layout,
        schedule: Schedule,
        rank: int,
        groups: PipelineGroups,
        precision: str,
        batch: Mapping[str, Tensor],
    ) -> None:
        """`batch` is one to try. Raises `UserError` for a model that cannot be cut."""
        require_pipeline(layout)
        require_float32([p for p in model.parameters() if p.requires_grad])
        have_whole_gradients(model)
        at = layout.coordinates(rank)
        self.stage, self.replica, self.num_stages = at.pipeline, at.data, layout.pipeline
        self.num_chunks = layout.pipeline * chunks_per_rank(schedule)
        self.schedule: Schedule = schedule
        self.groups = groups
        self.recipe = recipe
        self.precision = precision
        self.device = next(model.parameters()).device
        chunks = chunks_of(recipe, model, self.num_chunks)
        require_same_loss(recipe, model, chunks, batch, precision=precision, device=self.device)
        self.stage_of = {
            tensor: number % layout.pipeline
            for number, chunk in enumerate(chunks)
            for tensor in [*chunk.parameters(), *chunk.buffers()]
        }
        self.own = {number: chunks[number] for number in range(self.stage, self.num_chunks, layout.pipeline)}
        self._buffers = Buffers(model)
        self._stage_of_counters = self._stages_of_bytes(model)

    def _stages_of_bytes(self, model: nn.Module) -> Tensor:
        """Of the buffers that are no floats, end to end."""
        found = [tensor for module in model.modules() for tensor in module._buffers.values() if tensor is not None]
        counters = [tensor for tensor in found if not tensor.is_floating_point()]
        stages = torch.tensor([self.stage_of[tensor] for tensor in counters], dtype=torch.int64)
        return stages.repeat_interleave(torch.tensor([tensor.nbytes for tensor in counters], dtype=torch.int64))

    def share_counters(self) -> None:
        """Each stage tells what its chunks made of the buffers that are no floats. Collective over the stages."""
        num_bytes = len(self._stage_of_counters)
        if num_bytes:
            found = torch.empty(self.num_stages * num_bytes, dtype=torch.uint8)
            dist.all_gather_single(found, torch.from_numpy(self._buffers.counters()), group=self.groups.stages)
            picked = found.view(self.num_stages, num_bytes)[self._stage_of_counters, torch.arange(num_bytes)]
            self._buffers.set_counters(picked.numpy())


class PipelinedReducer:
    """Mean gradients over all virtual workers, of this stage's parameters. All ranks `compute`, then `finish`."""

    def __init__(
        self, pipeline: Pipeline, *, num_extras: int, ranges: Sequence[range], bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """`ranges` are the virtual workers of each replica, from the first to the last."""
        self.owned = ranges[pipeline.replica]
        self._pipeline = pipeline
        self._virtual_workers = ranges[-1].stop
        self._places = places(self.owned)
        self._actions = actions(
            pipeline.schedule,
            stage=pipeline.stage,
            num_stages=pipeline.num_stages,
            num_microbatches=len(self.owned),
        )
        self._passing = Passing(pipeline.groups.stages)
        self._chunks = {number: Chunk(module) for number, module in pipeline.own.items()}
        self._last_own = max(self._chunks)
        if self._last_own == pipeline.num_chunks - 1:
            self._rest = Rest(pipeline.recipe, pipeline.own[self._last_own], pipeline.device)
            self._objective = Objective(pipeline.recipe, self._rest, precision=pipeline.precision)
        group = Group(ranges, pipeline.replica, pipeline.device, pipeline.groups.replicas)
        self._buckets = {number: self._buckets_of(chunk, group, bucket_bytes) for number, chunk in pipeline.own.items()}
        self._extras = Bucket([], num_extras, group, lambda: None)
        buckets = [bucket for number in reversed(self._buckets) for bucket in self._buckets[number]]
        self._exchange = Exchange(buckets, [bucket.exchange for bucket in buckets])

    def _buckets_of(self, chunk: nn.Module, group: Group, bucket_bytes: int) -> list[Bucket]:
        parameters = [p for p in chunk.parameters() if p.requires_grad]
        planned = plan_buckets([p.numel() for p in parameters], bucket_bytes // 4) if parameters else []
        return [Bucket([parameters[n] for n in numbers], 0, group, self._when_full) for numbers in planned]

    def _when_full(self) -> None:
        self._exchange.start_full_ones()

    def compute(self, work: Work) -> None:
        """Forward and backward of all of this replica's virtual workers, as the schedule says."""
        received: list[Tensor] = []
        given: list[Tensor] = []
        for action in self._actions:
            one = action.of
            if action.verb == "receive":
                received = self._passing.receive(_tag(one), stage=one.chunk % self._pipeline.num_stages)
            elif action.verb == "send":
                self._passing.send(_tag(one), given, stage=self._stage_after(one))
            else:
                with recipe_errors(f"virtual worker {self.owned[one.microbatch]}, chunk {one.chunk} of a pipeline"):
                    given = self._forward(one, received, work) if one.is_forward else self._backward(one, received)
                received = []
        self._passing.wait()

    def _stage_after(self, one: Pass) -> int:
        return (one.chunk + 1 if one.is_forward else one.chunk - 1) % self._pipeline.num_stages

    def _forward(self, one: Pass, received: list[Tensor], work: Work) -> list[Tensor]:
        """Outputs, and where the random streams stand after them."""
        if one.chunk == self._pipeline.num_chunks - 1:
            self._forward_to_loss(one, received, work)
            return []
        device, worker = self._pipeline.device, self.owned[one.microbatch]
        chunk = self._chunks[one.chunk]
        if one.chunk == 0:
            work.seed(worker)
            inputs = [self._pipeline.recipe.inputs(work.batch(worker))]
        else:
            *inputs, streams = received
            set_streams(streams, device)
        outputs = chunk.forward(one.microbatch, inputs, lambda: self._computed(chunk.module, as_values(inputs)))
        if one.chunk == self._last_own:
            self._tell(one, None, work)
        return [*outputs, streams_now(device)]

    def _computed(self, module: nn.Module, values: Values) -> Values:
        is_bfloat16 = self._pipeline.precision == "bfloat16"
        with torch.autocast(self._pipeline.device.type, dtype=torch.bfloat16, enabled=is_bfloat16):
            found: Values = module(values)
        return found

    def _forward_to_loss(self, one: Pass, received: list[Tensor], work: Work) -> None:
        """The streams begin anew, and go on from where they stood where the loss calls its model."""
        *inputs, streams = received
        worker = self.owned[one.microbatch]
        batch = work.batch(worker)
        work.seed(worker)
        self._rest.begin(as_values(inputs), streams, batch)
        losses: list[Tensor] = []

        def compute() -> Tensor:
            losses.append(self._objective(batch))
            return losses[0] / self._virtual_workers

        self._chunks[one.chunk].forward(one.microbatch, inputs, compute)
        self._tell(one, losses[0].detach(), work)

    def _tell(self, one: Pass, maybe_loss: Tensor | None, work: Work) -> None:
        """With all chunks' buffers as this microbatch left them."""
        for chunk in self._chunks.values():
            chunk.hang_buffers_of(one.microbatch)
        worker = self.owned[one.microbatch]
        self._extras.begin(self._places[worker])
        self._extras.add_extras(work.told(worker, maybe_loss))
        self._extras.fill_up()

    def _backward(self, one: Pass, received: list[Tensor]) -> list[Tensor]:
        """Gradients of the inputs; those of parameters are summed."""
        buckets = self._buckets[one.chunk]
        for bucket in buckets:
            bucket.begin(self._places[self.owned[one.microbatch]])
        is_of_loss = one.chunk == self._pipeline.num_chunks - 1
        gradients = self._chunks[one.chunk].backward(one.microbatch, [None] if is_of_loss else received)
        for bucket in buckets:
            bucket.fill_up()
        return gradients

    def finish(self) -> Tensor:
        """Put the mean gradients of this stage's parameters in their places; returns the sum of all extras.

        Over stages that is a sum too: each number but the words is told by one of them, and the others add zeros."""
        self._exchange.wait()
        self._extras.exchange()
        for buckets in self._buckets.values():
            for bucket in buckets:
                bucket.hand_out()
        total = self._extras.extras
        dist.all_reduce(total, group=self._pipeline.groups.stages)
        self._pipeline.share_counters()
        return total

    def close(self) -> None:
        """Let the parameters go: another reducer may be made for them."""
        for buckets in self._buckets.values():
            for bucket in buckets:
                bucket.close()
        self._extras.close()
        self._passing.close()
        self._exchange.close(wait=False)
        self._buckets.clear()


def _tag(one: Pass) -> int:
    return 2 * one.chunk + one.is_forward
