"""A recipe's model as a pipeline: which rank has which chunks of it, and what cannot be cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.arithmetic.buffers import Buffers
from training.arithmetic.exact import require_float32
from training.arithmetic.sparse import have_whole_gradients
from training.config import ParallelConfig
from training.errors import UserError
from training.layout import Layout, Schedule
from training.parallel.parts import chunks_of
from training.parallel.pipeline_trial import PipelineTrial
from training.parallel.replica import ReplicaGroups
from training.parallel.schedule import chunks_per_rank
from training.parallel.tensor import CutModel
from training.recipe import Recipe


def require_cut(recipe: Recipe, model: nn.Module, parallel: ParallelConfig, device: torch.device) -> None:
    """Raises `UserError` naming what does not fit a pipeline, before anybody waits for this rank."""
    if device.type != "cpu":
        raise UserError("parallel.pipeline was tried on processors alone so far: use parallel.pipeline = 1 on GPUs")
    require_float32([p for p in model.parameters() if p.requires_grad])
    chunks_of(recipe, model, parallel.pipeline * chunks_per_rank(parallel.schedule))
    for stages in range(2, parallel.pipeline):  # what is left of it after a loss
        chunks_of(recipe, model, stages)


class Pipeline:
    """A model of which this rank computes every so-many-th chunk; of one stage it is the model. All chunks are there
    until they are freed."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        cut: CutModel,
        *,
        layout: Layout,
        schedule: Schedule,
        rank: int,
        groups: ReplicaGroups,
        precision: str,
        batch: Mapping[str, Tensor],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`cut` is the model, of which this rank has parts of matrices. `batch` is one to try; other ranks are waited
        for inside of `waiting`. Raises `UserError` for a model that cannot be cut."""
        require_float32([p for p in model.parameters() if p.requires_grad])
        have_whole_gradients(model)
        at = layout.coordinates(rank)
        self.stage, self.replica, self.num_stages = at.pipeline, at.data, layout.pipeline
        self.num_chunks = layout.pipeline * chunks_per_rank(schedule)
        self.schedule: Schedule = schedule
        self.cut = cut
        self.groups = groups
        self.waiting = waiting
        self.recipe = recipe
        self.precision = precision
        self.device = next(model.parameters()).device
        chunks: list[nn.Module] = [model]
        if self.num_chunks > 1:
            chunks = [*chunks_of(recipe, model, self.num_chunks)]
            PipelineTrial(recipe, model, chunks, batch, precision=precision).require_same()
        self.stage_of = {
            tensor: number % layout.pipeline
            for number, chunk in enumerate(chunks)
            for tensor in [*chunk.parameters(), *chunk.buffers()]
        }
        self.own = {number: chunks[number] for number in range(self.stage, self.num_chunks, layout.pipeline)}
        self._buffers = Buffers(model)
        self._stage_of_counters = self._stages_of_bytes(model)

    @property
    def reads(self) -> bool:
        """Whether this rank needs the samples: for the first chunk, or for the loss."""
        return self.stage in (0, self.num_stages - 1)

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
