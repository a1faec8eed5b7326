"""The training loop of one rank of a pipeline: it has consecutive parts of the model, and the bits are the same
(docs/parallelism.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from training.arithmetic.balance import Balance, ranges
from training.arithmetic.objective import seed_streams, stream_seed
from training.config import ParallelConfig
from training.data import ledger
from training.layout import Layout, in_stages
from training.parallel.pipeline import Pipeline, make_pipeline_groups
from training.parallel.pipelined import PipelinedReducer
from training.parallel.pipelined_update import PipelinedUpdate
from training.runs.pace import Straggler, maybe_straggler
from training.spread_loop import SpreadTrainer


class PipelinedTrainer(SpreadTrainer):
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

    def new_balance(self) -> Balance:
        """Over replicas: their stages have the same virtual workers."""
        return Balance(
            self.preset.train.virtual_workers,
            rank=self.layout.coordinates(self.rank.rank).data,
            world_size=self.layout.data,
            over_seconds=0.0,
            multiples_of=self.parallel.pipeline if self.parallel.schedule == "interleaved" else 1,
        )

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
            batch=self._one_to_try(),
            waiting=self.together,
        )

    def _one_to_try(self) -> Mapping[str, Tensor]:
        """Held-out samples, as many as a virtual worker has: none of them is to be trained with."""
        train = self.preset.train
        number = min(train.batch_size // train.virtual_workers, len(self.held_out))
        fields = self.held_out.read(range(number)).fields
        return {name: torch.from_numpy(array).to(self.rank.device) for name, array in fields.items()}

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

    @property
    def share(self) -> float:
        """Each stage does a part of the replica's work."""
        return super().share / self.layout.pipeline

    @property
    def tried_workers(self) -> Sequence[int]:
        """Stages share those of their replica out: each has all weights then."""
        return self.reducer.owned[self.pipeline.stage :: self.layout.pipeline]

    def straggler(self, outside_seconds: Sequence[float]) -> Straggler | None:
        """Compared with the same stage of other replicas: parts of a model do not take equally long."""
        num_stages = self.layout.pipeline
        for stage in range(num_stages):
            if maybe_slow := maybe_straggler(outside_seconds[stage::num_stages]):
                return replace(maybe_slow, rank=maybe_slow.rank * num_stages + stage)
        return None
