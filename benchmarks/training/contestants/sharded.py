"""This library's sharded state: a loop of its own, as the Trainer has it in data-parallel layouts alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta

import torch

from benchmarks.training.contestants.unbroken import Bench
from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, SEED, VIRTUAL_WORKERS, Workload, blocks_of
from training.arithmetic.balance import even_shares, ranges
from training.arithmetic.objective import Objective, fill_new_memory
from training.checkpoints.state import TrainState
from training.layout import Layout
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.update import ShardedUpdate

NUM_EXTRAS = 64
"""About so many numbers are summed beside gradients."""


def steps(workload: Workload, *, in_one_batch: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    fill_new_memory(False)
    recipe, rank, world_size = Bench(workload=workload), workload.rank, workload.world_size
    layout = Layout(shard=world_size)
    state = TrainState(recipe, seed=SEED, device=torch.device("cpu"))
    groups = make_groups(layout, rank, timeout=timedelta(seconds=120))
    sharded = Sharded(state.model, blocks_of(state.model), layout=layout, rank=rank, groups=groups)
    reducer = ShardedReducer(
        Objective(recipe, state.model, precision="float32"),
        sharded,
        num_extras=NUM_EXTRAS,
        ranges=ranges(even_shares(world_size if in_one_batch else VIRTUAL_WORKERS, world_size)),
    )
    update = ShardedUpdate(state, sharded, reducer, clip_norm=CLIP_NORM)
    for microbatches in workload.steps():
        parts = [torch.cat(list(microbatches))] if in_one_batch else microbatches
        for worker, part in zip(reducer.owned, parts, strict=True):
            loss = reducer.forward(worker, {"bytes": part})
            reducer.backward(worker, loss, torch.zeros(NUM_EXTRAS))
        reducer.finish()
        update.clip()
        update.apply()
        yield


if __name__ == "__main__":
    serve(lambda workload: steps(workload, in_one_batch=sys.argv[2] == "one-batch"))
