"""A transformer that trains in several layouts: what a rank does in a step of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.balance import even_shares, ranges
from training.arithmetic.exact import ExactReducer
from training.arithmetic.objective import Objective, seed_streams
from training.checkpoints.state import TrainState
from training.errors import DeterministicError
from training.layout import Layout, Schedule
from training.parallel.pipeline import Pipeline
from training.parallel.pipelined import PipelinedReducer
from training.parallel.replica import make_replica_groups
from training.parallel.replica_update import ReplicaUpdate
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.tensor import CutModel
from training.parallel.tensor_peers import Peers, Waiting
from training.parallel.update import ShardedUpdate
from training.recipes.stdlib import ByteTransformer
from training.step import LocalUpdate

BATCH, VIRTUAL_WORKERS, CLIP_NORM = 16, 4, 1.0
TIMEOUT = timedelta(minutes=10)
CPU = torch.device("cpu")
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    layout: Layout
    maybe_schedule: Schedule | None = None


CASES = (
    Case(name="data 2", layout=Layout(data=2)),
    Case(name="shard 2", layout=Layout(shard=2)),
    Case(name="pipeline 2, 1f1b", layout=Layout(pipeline=2), maybe_schedule="1f1b"),
    Case(name="tensor 2", layout=Layout(tensor=2)),
)


def recipe_of(width: int, num_layers: int) -> ByteTransformer:
    return ByteTransformer(sequence_bytes=128, width=width, num_layers=num_layers, num_heads=8)


def batch_of(recipe: ByteTransformer, worker: int) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(worker)
    shape = (BATCH // VIRTUAL_WORKERS, recipe.sequence_bytes + 1)
    return {"bytes": torch.randint(0, 256, shape, generator=chance, dtype=torch.uint8)}


class Work:
    """Of a replica of several ranks."""

    def __init__(self, recipe: ByteTransformer) -> None:
        self._recipe = recipe

    def seed(self, worker: int) -> None:
        seed_streams(worker, CPU)

    def batch(self, worker: int) -> Mapping[str, Tensor]:
        return batch_of(self._recipe, worker)

    def where(self, worker: int) -> str:
        return f"virtual worker {worker}"

    def told(self, worker: int, maybe_loss: Tensor | None) -> Tensor:
        return torch.zeros(1) if maybe_loss is None else maybe_loss.reshape(1)

    def give_up(self, worker: int, error: DeterministicError) -> None:
        raise error

    def told_of_failed(self) -> Tensor:
        return torch.full((1,), torch.nan)


def step_in(case: Case, recipe: ByteTransformer, rank: int) -> Step:
    """What this rank does. Collective."""
    state = TrainState(recipe, seed=1, device=CPU)
    makers = {"shard": _in_shards, "pipeline": _in_stages_and_parts, "tensor": _in_stages_and_parts}
    maker = next((makers[name] for name in makers if getattr(case.layout, name) > 1), _in_replicas)
    return maker(case, recipe, state, rank)


def _steps(recipe: ByteTransformer, reducer: Any, updater: Any) -> Step:
    def step() -> None:
        for worker in reducer.owned:
            loss = reducer.forward(worker, batch_of(recipe, worker))
            reducer.backward(worker, loss, loss.detach().reshape(1).clone())
            del loss
        reducer.finish()
        updater.clip()
        updater.apply()

    return step


def _objective(recipe: ByteTransformer, state: TrainState) -> Objective:
    return Objective(recipe, state.model, precision="float32")


def _shares(number: int) -> list[range]:
    return list(ranges(even_shares(VIRTUAL_WORKERS, number)))


def _in_replicas(case: Case, recipe: ByteTransformer, state: TrainState, rank: int) -> Step:
    objective = _objective(recipe, state)
    reducer = ExactReducer(objective, num_extras=1, ranges=_shares(case.layout.data), rank=rank)
    return _steps(recipe, reducer, LocalUpdate(state, clip_norm=CLIP_NORM))


def _in_shards(case: Case, recipe: ByteTransformer, state: TrainState, rank: int) -> Step:
    groups = make_groups(case.layout, rank, timeout=TIMEOUT)
    sharded = Sharded(state.model, recipe.blocks(state.model), layout=case.layout, rank=rank, groups=groups)
    reducer = ShardedReducer(_objective(recipe, state), sharded, num_extras=1, ranges=_shares(case.layout.num_feeds))
    return _steps(recipe, reducer, ShardedUpdate(state, sharded, reducer, clip_norm=CLIP_NORM))


def pipeline_of(
    case: Case, recipe: ByteTransformer, model: nn.Module, rank: int, *, waiting: Waiting = nullcontext
) -> Pipeline:
    """Of a model whose matrices are cut. Collective."""
    groups = make_replica_groups(case.layout, rank, timeout=TIMEOUT)
    return Pipeline(
        recipe,
        model,
        CutModel(recipe, model, Peers(groups.computing, waiting=waiting), in_sequences=True),
        layout=case.layout,
        schedule=case.maybe_schedule or "1f1b",
        rank=rank,
        groups=groups,
        precision="float32",
        batch=batch_of(recipe, 0),
        waiting=waiting,
    )


def _in_stages_and_parts(case: Case, recipe: ByteTransformer, state: TrainState, rank: int) -> Step:
    pipeline = pipeline_of(case, recipe, state.model, rank)
    reducer = PipelinedReducer(pipeline, num_extras=1, ranges=_shares(case.layout.data))
    updater = ReplicaUpdate(state, pipeline, clip_norm=CLIP_NORM)

    def step() -> None:
        reducer.compute(Work(recipe))
        reducer.finish()
        updater.clip()
        updater.apply()

    return step
