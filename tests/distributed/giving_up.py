"""Steps in which a rank fails at some word to the others of its stage, or after it. Imported by spawned processes: no
fixtures."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.ranks import TIMEOUT_SECONDS
from tests.distributed.tensoring import RECIPES, SEQUENCE
from tests.unit.tiny import CPU
from training.arithmetic.objective import seed_streams
from training.checkpoints.state import TrainState
from training.errors import DeterministicError
from training.layout import Layout, Schedule
from training.parallel.pipeline import Pipeline
from training.parallel.pipelined import PipelinedReducer
from training.parallel.replica import make_replica_groups
from training.parallel.tensor import CutModel
from training.parallel.tensor_peers import Peers

NUM_WORKERS = 4
RECIPE = RECIPES["deep"]


class FailingPeers(Peers):
    """Fails at one word of a step, or once it was said."""

    num_said = 0
    maybe_at: int | None = None
    is_after = False

    def of_all(self, own: Tensor) -> Tensor:
        self._maybe_fail(False)
        found = super().of_all(own)
        self._maybe_fail(True)
        return found

    def dealt(self, pieces: Tensor) -> Tensor:
        self._maybe_fail(False)
        found = super().dealt(pieces)
        self._maybe_fail(True)
        return found

    def _maybe_fail(self, is_after: bool) -> None:
        if self.num_said == self.maybe_at and is_after == self.is_after:
            raise ValueError("what is this?")
        self.num_said += is_after


class Work:
    """Notes why it was given up."""

    def __init__(self) -> None:
        self.causes: list[str] = []

    def seed(self, worker: int) -> None:
        seed_streams(worker, CPU)

    def batch(self, worker: int) -> Mapping[str, Tensor]:
        chance = torch.Generator().manual_seed(worker)
        return {"bytes": torch.randint(0, 256, (2, SEQUENCE + 1), generator=chance, dtype=torch.uint8)}

    def where(self, worker: int) -> str:
        return f"virtual worker {worker}"

    def told(self, worker: int, maybe_loss: Tensor | None) -> Tensor:
        return torch.zeros(1) if maybe_loss is None else maybe_loss.reshape(1)

    def give_up(self, worker: int, error: DeterministicError) -> None:
        self.causes.append(repr(error.__cause__))

    def told_of_failed(self) -> Tensor:
        return torch.full((1,), torch.nan)


def failing(
    rank: int, world_size: int, layout: Layout, schedule: Schedule, in_sequences: bool, num_steps: int
) -> list[tuple[bool, list[str]]]:
    """Of a step in which nothing fails, and of so many in which something does, in groups of their own: whether the
    loss is a number, and what this rank saw."""
    found = []
    num_words = 0
    for number in range(num_steps + 1):
        chance = random.Random(number)
        victim, share, is_after = chance.randrange(world_size), chance.random(), chance.random() < 0.5
        maybe_at = int(share * num_words) if number and rank == victim else None
        said, told, work = _step(rank, layout, schedule, in_sequences, maybe_at, is_after)
        num_words = num_words or said
        found.append((bool(told.isfinite().all()), work.causes))
        dist.barrier()
    return found


def _step(
    rank: int, layout: Layout, schedule: Schedule, in_sequences: bool, maybe_at: int | None, is_after: bool
) -> tuple[int, Tensor, Work]:
    groups = make_replica_groups(layout, rank, timeout=timedelta(seconds=TIMEOUT_SECONDS / 2))
    model, work, peers = TrainState(RECIPE, seed=1, device=CPU).model, Work(), FailingPeers(groups.computing)
    about: dict[str, Any] = {"schedule": schedule, "rank": rank, "groups": groups, "precision": "float32"}
    cut = CutModel(RECIPE, model, peers, in_sequences=in_sequences, maybe_settling=Peers(groups.settling))
    pipeline = Pipeline(RECIPE, model, cut, layout=layout, batch=work.batch(99), **about)
    ranges = [range(d * NUM_WORKERS, (d + 1) * NUM_WORKERS) for d in range(layout.data)]
    reducer = PipelinedReducer(pipeline, num_extras=1, ranges=ranges)
    peers.num_said, peers.maybe_at, peers.is_after = 0, maybe_at, is_after
    reducer.compute(work)
    told = reducer.finish()
    reducer.close()
    return peers.num_said, told, work
