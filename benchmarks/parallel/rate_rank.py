"""One of the ranks: whole steps of our loop and of a hand-written loop around FSDP2, in turn, of the same samples."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchmarks.parallel.ranks import answer, meet
from benchmarks.parallel.rate import BASE, OURS
from benchmarks.parallel.work import BATCH, CLIP_NORM, CPU, recipe_of
from tests.unit.tiny import MemoryFeed, MemoryReader, make_trainer, tiny_preset
from training.arithmetic.objective import fill_new_memory
from training.checkpoints.state import TrainState
from training.config import ParallelConfig, Preset
from training.memory.handover import Handover
from training.memory.slots import Slots, create_slots
from training.recipe import Recipe, learning_rate_scale
from training.sharded_loop import ShardedTrainer

NUM_SAMPLES = 256
NUM_LAYERS = 4
TARGET_SECONDS = 1.0
NUM_WARM_UP_STEPS = 3
CLOSE = 0.02
"""Losses of the same step, which are rounded in other places."""
Steps = Iterator[float]
"""Makes a step each time, and gives its loss."""


def main() -> None:
    width, virtual_workers, num_rounds = map(int, sys.argv[1:])
    rank = meet()
    recipe = recipe_of(width, NUM_LAYERS)
    preset = preset_of(virtual_workers)
    steps = {
        name: make(recipe, preset, rank) for name, make in CONTESTANTS.items() if name != EACH or virtual_workers > 2
    }
    for one in steps.values():
        _timed(one, NUM_WARM_UP_STEPS)
    num_steps = _agreed(max(1, round(TARGET_SECONDS / _timed(steps[BASE], 1)[0])))
    for name in steps:
        if name != BASE:
            _timed(steps[name], 1)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds):
        losses = []
        for name in _rotated(list(steps), number):
            taken, loss = _timed(steps[name], num_steps)
            seconds[name].append(taken / num_steps)
            losses.append(loss)
        assert math.isclose(min(losses), max(losses), rel_tol=CLOSE), "they train the same"
    answer(seconds)


def preset_of(virtual_workers: int) -> Preset:
    preset = tiny_preset(steps=10**6, checkpoint_every_steps=10**6)
    train = replace(
        preset.train, batch_size=BATCH, virtual_workers=virtual_workers, clip_norm=CLIP_NORM, digest_every_steps=0
    )
    num_ranks = dist.get_world_size()
    launch = replace(preset.launch, nodes=num_ranks)
    return replace(preset, train=train, launch=launch, parallel=ParallelConfig(shard=num_ranks))


def _reader(recipe: Recipe) -> MemoryReader:
    width = recipe.sequence_bytes + 1  # type: ignore[attr-defined]  # it is the byte transformer
    texts = np.random.default_rng(3).integers(0, 256, (NUM_SAMPLES, width), dtype=np.uint8)
    return MemoryReader({"bytes": texts})


def ours(recipe: Recipe, preset: Preset, rank: int, *, copies: bool = False) -> Steps:
    """Whole steps of the Trainer: random streams, ledger and checks of the loss included; perhaps a copy of the state's
    parts on the other rank, too."""
    trainer = make_trainer(
        preset=preset,
        recipe=recipe,
        reader=_reader(recipe),
        rank=rank,
        world_size=dist.get_world_size(),
        handover=Handover(Slots(create_slots())),
        kind=ShardedTrainer,
    )
    assert isinstance(trainer, ShardedTrainer)
    trainer.begin_group()
    while True:
        torch.use_deterministic_algorithms(True)
        fill_new_memory(False)  # as Trainer.train does after its first step
        loss = trainer.train_step().loss
        trainer.handover.forget(trainer.state.step)  # as after a checkpoint: the journal stays short
        if copies:
            trainer.copy()
        torch.use_deterministic_algorithms(False)
        yield loss


def fsdp(recipe: Recipe, preset: Preset, rank: int, *, reduces_each: bool = False, is_foreach: bool = True) -> Steps:
    """As its documentation has it: each block is a group, and the rest of the model is one."""
    state = TrainState(recipe, seed=preset.seed, device=CPU)  # the same first weights
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in recipe.blocks(state.model):
        fully_shard(block, mesh=mesh)
    fully_shard(state.model, mesh=mesh)
    assert isinstance(state.model, FSDPModule)
    optimizer = recipe.optimizer(state.model)
    optimizer.param_groups[0]["foreach"] = is_foreach
    base_rate = optimizer.param_groups[0]["lr"]
    for step, microbatches in enumerate(_microbatches(recipe, preset, rank)):
        optimizer.param_groups[0]["lr"] = base_rate * learning_rate_scale(recipe, step, preset.train.steps)
        total = torch.zeros(())
        for number, batch in enumerate(microbatches, start=1):
            state.model.set_requires_gradient_sync(reduces_each or number == len(microbatches))
            loss = recipe.loss(state.model, batch) / len(microbatches)
            loss.backward()  # type: ignore[no-untyped-call]  # no annotation
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        yield total.item() / dist.get_world_size()


def _microbatches(recipe: Recipe, preset: Preset, rank: int) -> Iterator[Sequence[Mapping[str, Tensor]]]:
    """Of each step, those that are ours too."""
    per_rank = preset.train.virtual_workers // dist.get_world_size()
    workers = range(rank * per_rank, (rank + 1) * per_rank)
    feed = MemoryFeed(_reader(recipe), preset).microbatches(workers=workers, step=0)
    while True:
        found = [next(feed).fields for _ in workers]
        yield [{name: torch.from_numpy(array) for name, array in fields.items()} for fields in found]


EACH = "FSDP2, a reduce-scatter for each microbatch"
CONTESTANTS: dict[str, Callable[[Recipe, Preset, int], Steps]] = {
    BASE: fsdp,
    "FSDP2, `foreach=False` as ours": partial(fsdp, is_foreach=False),
    EACH: partial(fsdp, reduces_each=True),
    OURS: ours,
    f"{OURS}, a copy after each step": partial(ours, copies=True),
}


def _rotated(names: list[str], number: int) -> list[str]:
    return names[number % len(names) :] + names[: number % len(names)]


def _agreed(number: int) -> int:
    found = torch.tensor(number)
    dist.broadcast(found, 0)
    return int(found)


def _timed(steps: Steps, num_steps: int) -> tuple[float, float]:
    """Seconds, and the last loss."""
    dist.barrier()
    started = time.perf_counter()
    loss = 0.0
    for _ in range(num_steps):
        loss = next(steps)
    dist.barrier()
    return time.perf_counter() - started, loss


if __name__ == "__main__":
    main()
