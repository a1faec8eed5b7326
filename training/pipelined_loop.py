"""The training loop of one rank of a pipeline: it has consecutive parts of the model, and the bits are the same
(docs/parallelism.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from training.arithmetic.balance import ranges
from training.arithmetic.objective import seed_streams, stream_seed
from training.config import ParallelConfig
from training.data import ledger
from training.layout import Layout, in_stages
from training.parallel.pipeline import Pipeline, make_pipeline_groups
from training.parallel.pipelined import PipelinedReducer
from training.parallel.pipelined_update import PipelinedUpdate
from training.replica_loop import ReplicaTrainer


class PipelinedTrainer(ReplicaTrainer):
    """Trains one run to its end, `parallel.pipeline` ranks together one replica. `train` is collective.

    It is itself what its reducer asks for the work of a step (`training.parallel.pipelined.Work`).
    """

    _ids: Sequence[str] = ()
    """Of the newest microbatch."""

    @property
    def layout(self) -> Layout:
        return in_stages(self.rank.world_size, self.parallel.pipeline)

    @cached_property
    def parallel(self) -> ParallelConfig:
        return self.preset.parallel.on(self.rank.world_size, self.preset.train)

    @property
    def round_workers(self) -> int:
        return self.parallel.pipeline if self.parallel.schedule == "interleaved" else 1

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model, once its state was loaded. Collective."""
        rank, timeout_seconds = self.rank.rank, self.preset.launch.collective_timeout_seconds
        with self.together():
            groups = make_pipeline_groups(self.layout, rank, timeout=timedelta(seconds=timeout_seconds))
        return Pipeline(
            self.recipe,
            self.state.model,
            layout=self.layout,
            schedule=self.parallel.schedule,
            rank=rank,
            groups=groups,
            precision=self.preset.train.precision,
            batch=self.one_to_try(),
            waiting=self.together,
        )

    @cached_property
    def reducer(self) -> PipelinedReducer:  # type: ignore[override]  # it is asked for a step, not for a virtual worker
        return PipelinedReducer(self.pipeline, num_extras=self.extras.num_elements, ranges=ranges(self.balance.shares))

    def new_update(self) -> PipelinedUpdate:
        return PipelinedUpdate(self.state, self.pipeline, clip_norm=self.preset.train.clip_norm)

    def begin_reading(self, step: int) -> None:
        """The stages between the first and the last read nothing."""
        if self.pipeline.reads:
            super().begin_reading(step)

    def compute(self) -> None:
        """All virtual workers of the replica, in the order of the schedule."""
        self.reducer.compute(self)

    def seed(self, worker: int) -> None:
        seed_streams(stream_seed(self.preset.seed, self.state.step, worker), self.rank.device)

    def batch(self, worker: int) -> Mapping[str, Tensor]:
        self._ids, batch = self.microbatch(worker)
        return batch

    def where(self, worker: int) -> str:
        return f"step {self.state.step + 1}, virtual worker {worker}"

    def told(self, worker: int, maybe_loss: Tensor | None) -> Tensor:
        words = self.wishes().words() if worker == self.reducer.owned[-1] else ()
        if maybe_loss is None:
            return self.extras.gather(torch.zeros(()), words, np.zeros(ledger.NUM_ENTRIES, np.float32))
        self.require_finite(maybe_loss, worker, self._ids)
        return self.extras.gather(maybe_loss, words, ledger.entries(worker, self._ids))
