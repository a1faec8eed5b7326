"""Exact mode with a replica of several ranks, which have stages of the model, or parts of its matrices, or both.

Microbatches are the replica's virtual workers. A chunk goes back through them in their order, in each schedule, so its
gradients are added up along the tree as everywhere, and then over the replicas of its stage: stages change no bit, and
the bits are those of so many parts of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.arithmetic.exact import BUCKET_BYTES, Bucket, Exchange, Group, plan_buckets
from training.arithmetic.objective import Objective, recipe_errors
from training.arithmetic.reduce import places
from training.arithmetic.streams import set_streams, streams_now
from training.errors import DeterministicError
from training.parallel.chunk import Chunk, as_values
from training.parallel.parts import Rest, Values
from training.parallel.passing import Passing
from training.parallel.pipeline import Pipeline
from training.parallel.schedule import Pass, actions


class Work(Protocol):
    """What a step is made of, for each virtual worker."""

    def seed(self, worker: int) -> None:
        """Its random streams, from their beginning."""
        ...

    def batch(self, worker: int) -> Mapping[str, Tensor]:
        """Of the first and the last stage, once of each worker, in their order."""
        ...

    def where(self, worker: int) -> str:
        """As errors are to say it."""
        ...

    def told(self, worker: int, maybe_loss: Tensor | None) -> Tensor:
        """What is summed over all virtual workers beside gradients: this stage's part of it, zeros for what others
        know. The last stage knows the loss."""
        ...

    def give_up(self, worker: int, error: DeterministicError) -> None:
        """It failed on this rank, or by another one's doing, and the step goes on to its end without this one and
        those after it, so that no other rank waits for ever."""
        ...

    def told_of_failed(self) -> Tensor:
        """Likewise, of one that was given up, here or elsewhere: by this all ranks hear of it."""
        ...


class PipelinedReducer:
    """Mean gradients over all virtual workers, of this stage's parameters, or of this rank's parts of them. All ranks
    `compute`, then `finish`."""

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
        self._first_own, self._last_own = min(self._chunks), max(self._chunks)
        self._has_given_up = False
        """This step, which is the last: no microbatch goes any further on this rank."""
        self._told: dict[int, Tensor] = {}
        """Of each microbatch under way: what is summed of it beside gradients."""
        self._maybe_rest: Rest | None = None
        if self._last_own == pipeline.num_chunks - 1:
            model = pipeline.own[self._last_own]
            if pipeline.num_chunks > 1:
                model = self._maybe_rest = Rest(pipeline.recipe, model, pipeline.device)
            self._objective = Objective(pipeline.recipe, model, precision=pipeline.precision)
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
        maybe_received: list[Tensor] | None = []
        maybe_given: list[Tensor] | None = []
        for action in self._actions:
            one = action.of
            if action.verb == "receive":
                with self._pipeline.waiting():
                    maybe_received = self._passing.receive(_tag(one), stage=one.chunk % self._pipeline.num_stages)
            elif action.verb == "send":
                with self._pipeline.waiting():
                    self._passing.send(_tag(one), maybe_given, stage=self._stage_after(one))
            else:
                go = self._go_forward if one.is_forward else self._go_back
                maybe_given = go(one, maybe_received, work)
                maybe_received = []
        with self._pipeline.waiting():
            self._passing.wait()

    def _stage_after(self, one: Pass) -> int:
        return (one.chunk + 1 if one.is_forward else one.chunk - 1) % self._pipeline.num_stages

    def _go_forward(self, one: Pass, maybe_received: list[Tensor] | None, work: Work) -> list[Tensor] | None:
        """What goes to the next chunk; None of a microbatch that was given up."""
        is_read = one.chunk in (0, self._pipeline.num_chunks - 1)
        batch = work.batch(self.owned[one.microbatch]) if is_read else {}
        return self._unless_given_up(one, maybe_received, work, lambda found: self._forward(one, found, batch, work))

    def _go_back(self, one: Pass, maybe_received: list[Tensor] | None, work: Work) -> list[Tensor] | None:
        """Gradients of the inputs, likewise; those of parameters are summed."""
        place = self._places[self.owned[one.microbatch]]
        buckets = self._buckets[one.chunk]
        for bucket in buckets:
            bucket.begin(place)
        maybe_given = self._unless_given_up(one, maybe_received, work, lambda found: self._backward(one, found))
        for bucket in buckets:
            bucket.fill_up()
        if one.chunk == self._first_own:
            told = self._told.pop(one.microbatch, None)
            if told is None or self._has_given_up:
                told = work.told_of_failed()
            self._extras.begin(place)
            self._extras.add_extras(told)
            self._extras.fill_up()
        return maybe_given

    def _unless_given_up(
        self,
        one: Pass,
        maybe_received: list[Tensor] | None,
        work: Work,
        compute: Callable[[list[Tensor]], list[Tensor]],
    ) -> list[Tensor] | None:
        """A pass of a microbatch; None if it fails, or one did so before, here or elsewhere."""
        if maybe_received is not None and not self._has_given_up:
            try:
                with recipe_errors(self._where(one, work)):
                    return compute(maybe_received)
            except DeterministicError as error:
                work.give_up(self.owned[one.microbatch], error)
        self._give_up()
        self._chunks[one.chunk].forget(one.microbatch)
        return None

    def _where(self, one: Pass, work: Work) -> str:
        where = work.where(self.owned[one.microbatch])
        return where if self._pipeline.num_chunks == 1 else f"{where}, chunk {one.chunk} of the pipeline"

    def _give_up(self) -> None:
        """Other stages are told in the place of what they wait for. Ranks of this one may wait in the midst of the same
        pass, in a collective that this one will not come to: they hear of it by their connections."""
        if not self._has_given_up:
            self._has_given_up = True
            self._pipeline.groups.connections.cut()

    def _forward(self, one: Pass, received: list[Tensor], batch: Mapping[str, Tensor], work: Work) -> list[Tensor]:
        """Outputs, and where the random streams stand after them."""
        device, worker = self._pipeline.device, self.owned[one.microbatch]
        if one.chunk == 0:
            work.seed(worker)
            received = [self._pipeline.recipe.inputs(batch), streams_now(device)]
        *inputs, streams = received
        if one.chunk == self._pipeline.num_chunks - 1:
            self._forward_to_loss(one, inputs, streams, batch, work)
            return []
        chunk = self._chunks[one.chunk]
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

    def _forward_to_loss(
        self, one: Pass, inputs: list[Tensor], streams: Tensor, batch: Mapping[str, Tensor], work: Work
    ) -> None:
        """The streams begin anew, and go on from where they stood where the loss calls its model."""
        work.seed(self.owned[one.microbatch])
        if self._maybe_rest is not None:
            self._maybe_rest.begin(as_values(inputs), streams, batch)
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
        self._told[one.microbatch] = work.told(self.owned[one.microbatch], maybe_loss)

    def _backward(self, one: Pass, received: list[Tensor]) -> list[Tensor]:
        is_of_loss = one.chunk == self._pipeline.num_chunks - 1
        return self._chunks[one.chunk].backward(one.microbatch, [None] if is_of_loss else received)

    def finish(self) -> Tensor:
        """Put the mean gradients of this rank's parameters in their places; returns the sum of all extras.

        Over stages that is a sum too: each number but the words is told by one of them, and the others add zeros. All
        ranks of a stage have the same, but for words that one says, where others have zeros; and for what one failed
        at, which is no number."""
        self._exchange.wait()
        self._extras.exchange()
        for buckets in self._buckets.values():
            for bucket in buckets:
                bucket.hand_out()
        cut = self._pipeline.cut
        cut.sum_partly_summed()
        total = cut.peers.of_all(self._extras.extras).amax(0)
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
