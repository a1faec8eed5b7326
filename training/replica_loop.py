"""The training loop of one rank whose replica has several: they have stages of the model, or parts of its matrices, or
both, and the same virtual workers. Stages change no bit; the bits are those of so many parts (docs/parallelism.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from training.errors import DeterministicError
from training.layout import Layout, in_stages
from training.memory.handover import GroupLost
from training.parallel.pipeline import Pipeline
from training.parallel.pipelined import PipelinedReducer
from training.parallel.replica import ReplicaGroups, make_replica_groups
from training.parallel.replica_update import ReplicaUpdate
from training.parallel.tensor import CutModel
from training.parallel.tensor_peers import Peers
from training.parallel.tensor_trial import TensorTrial
from training.runs.pace import Straggler, maybe_straggler
from training.spread_loop import SpreadTrainer


class ReplicaTrainer(SpreadTrainer):
    """Trains one run to its end, `parallel.pipeline × parallel.tensor` ranks together one replica. `train` is
    collective.

    It is itself what its reducer asks for the work of a step (`training.parallel.pipelined.Work`).
    """

    _ids: Sequence[str] = ()
    """Of the newest microbatch."""

    @cached_property
    def parallel(self) -> ParallelConfig:
        """Of the group."""
        return self.preset.parallel.on(self.rank.world_size, self.preset.train)

    @property
    def layout(self) -> Layout:
        return in_stages(self.rank.world_size, self.parallel.pipeline, tensor=self.parallel.tensor)

    def new_balance(self) -> Balance:
        """Over replicas."""
        return Balance(
            self.preset.train.virtual_workers,
            rank=self.layout.coordinates(self.rank.rank).data,
            world_size=self.layout.data,
            over_seconds=0.0,
            multiples_of=self.parallel.pipeline if self.parallel.schedule == "interleaved" else 1,
        )

    @cached_property
    def groups(self) -> ReplicaGroups:
        timeout = timedelta(seconds=self.preset.launch.collective_timeout_seconds)
        with self.together():
            return make_replica_groups(self.layout, self.rank.rank, timeout=timeout)

    @cached_property
    def cut(self) -> CutModel:
        """The model, once its state was loaded. New weights alone are tried: of trained ones roundings may be large,
        and a run that is taken up has been tried. Collective."""
        assert self.digest_period >= 0  # which hangs on the size of the whole
        groups, model = self.groups, self.state.model
        is_tried = self.parallel.tensor > 1 and self.state.step == 0
        maybe_trial = TensorTrial(self.recipe, model, self.one_to_try()) if is_tried else None
        cut = CutModel(
            self.recipe,
            model,
            Peers(groups.computing, waiting=self.together),
            in_sequences=self.parallel.sequences == "parts",
            maybe_settling=Peers(groups.settling, waiting=self.together),
        )
        if maybe_trial is not None:
            with self._trying(), self.together():
                maybe_trial.require_same(cut)
        return cut

    @cached_property
    def pipeline(self) -> Pipeline:
        """Of what is cut. Collective."""
        cut = self.cut
        with self._trying():
            return Pipeline(
                self.recipe,
                self.state.model,
                cut,
                layout=self.layout,
                schedule=self.parallel.schedule,
                rank=self.rank.rank,
                groups=self.groups,
                precision=self.preset.train.precision,
                batch=self.one_to_try(),
                waiting=self.together,
            )

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """A rank that is lost meanwhile is not the recipe's doing."""
        try:
            yield
        except DeterministicError as error:
            if isinstance(error.__cause__, GroupLost):
                raise error.__cause__ from None
            raise

    def one_to_try(self) -> Mapping[str, Tensor]:
        """Held-out samples, as many as a virtual worker has: none of them is to be trained with."""
        train = self.preset.train
        number = min(train.batch_size // train.virtual_workers, len(self.held_out))
        fields = self.held_out.read(range(number)).fields
        return {name: torch.from_numpy(array).to(self.rank.device) for name, array in fields.items()}

    @cached_property
    def reducer(self) -> PipelinedReducer:  # type: ignore[override]  # it is asked for a step, not for a virtual worker
        return PipelinedReducer(self.pipeline, num_extras=self.extras.num_elements, ranges=ranges(self.balance.shares))

    def new_update(self) -> ReplicaUpdate:
        return ReplicaUpdate(self.state, self.pipeline, clip_norm=self.preset.train.clip_norm)

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

    def give_up(self, worker: int, error: DeterministicError) -> None:
        """Another rank has cut this one's connections, or is gone, or a cable: the step's end tells which."""
        if isinstance(error.__cause__, GroupLost):
            self._maybe_broken = str(error.__cause__)
        else:
            super().give_up(worker, error)

    @property
    def ranks_per_replica(self) -> int:
        return self.layout.num_ranks // self.layout.data

    @property
    def share(self) -> float:
        """Each rank does a part of the replica's work."""
        return super().share / self.ranks_per_replica

    @property
    def tried_workers(self) -> Sequence[int]:
        """They share those of their replica out: each has all weights then."""
        return self.reducer.owned[self.rank.rank % self.ranks_per_replica :: self.ranks_per_replica]

    def straggler(self, outside_seconds: Sequence[float]) -> Straggler | None:
        """Compared with the same stage of other replicas: parts of a model do not take equally long."""
        for ranks in self.layout.groups("data", "tensor"):
            if maybe_slow := maybe_straggler([outside_seconds[rank] for rank in ranks]):
                return replace(maybe_slow, rank=ranks[maybe_slow.rank])
        return None
