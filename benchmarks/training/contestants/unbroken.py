"""This library, in exact or fast mode, or with parameter servers: whole steps of its Trainer, ledger included."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.training.protocol import serve
from benchmarks.training.workload import (
    CLIP_NORM,
    NUM_DATA_STEPS,
    SAMPLES_PER_MICROBATCH,
    SEED,
    VIRTUAL_WORKERS,
    Workload,
    optimizer_of,
)
from training.arithmetic.objective import fill_new_memory
from training.arithmetic.validation import HeldOut
from training.checkpoints.saver import CheckpointSaver
from training.config import DataConfig, LaunchConfig, Preset, TrainConfig
from training.data.stream import Microbatch
from training.loop import Trainer
from training.recipe import Recipe
from training.runs.record import Record, RunRecord
from training.servers.colocated import Colocated
from training.step import Rank

NUM_STEPS = 10**6
CPU = torch.device("cpu")


def _not_used(*_: Any) -> NoReturn:
    raise NotImplementedError("the bench has its own data")


@dataclass(frozen=True, kw_only=True)
class Bench(Recipe):
    """The workload's model as a recipe."""

    workload: Workload
    encode = scores = inputs = cast(Any, _not_used)

    def model(self) -> nn.Module:
        return self.workload.model()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = model(batch)
        return loss

    def optimizer(self, model: nn.Module) -> Optimizer:
        return optimizer_of(model)


@dataclass(frozen=True)
class MemoryFeed:
    """The workload's samples, with ids."""

    workload: Workload

    def held_out(self) -> HeldOut:
        raise NotImplementedError("the bench validates nothing")

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        ids = {
            (place, worker): [f"bench:{place}/{worker}#{n}" for n in range(SAMPLES_PER_MICROBATCH)]
            for place in range(NUM_DATA_STEPS)
            for worker in workers
        }
        for number in range(step, NUM_STEPS):
            for worker in workers:
                fields = {"bytes": self.workload.arrays(number, worker)}
                yield Microbatch(step=number, worker=worker, ids=ids[number % NUM_DATA_STEPS, worker], fields=fields)


def preset_of(
    workload: Workload, mode: Literal["exact", "fast"], *, num_replicas: int = 0, num_shards: int = 0
) -> Preset:
    """With `num_replicas`, each rank is a server too, and as many hold each shard: as many as ranks, unless
    `num_shards` says how many."""
    train = TrainConfig(
        steps=NUM_STEPS,
        checkpoint_every_steps=NUM_STEPS,  # none: there is no store
        batch_size=VIRTUAL_WORKERS * SAMPLES_PER_MICROBATCH,
        virtual_workers=VIRTUAL_WORKERS,
        clip_norm=CLIP_NORM,
        mode=mode,
        strategy="parameter_server" if num_replicas else "all_reduce",
    )
    return Preset(
        name="bench",
        recipe="bench:Bench",
        data=DataConfig(name="bench", source="nowhere", format="files"),
        train=train,
        launch=LaunchConfig(nodes=1, servers=num_shards or workload.world_size, server_replicas=max(1, num_replicas)),
        seed=SEED,
    )


def steps(
    workload: Workload, mode: Literal["exact", "fast"], *, num_replicas: int = 0, num_shards: int = 0
) -> Iterator[None]:
    """Each time, a step."""
    torch.use_deterministic_algorithms(True)
    fill_new_memory(False)  # as Trainer.train does after its first step
    preset = preset_of(workload, mode, num_replicas=num_replicas, num_shards=num_shards)
    recipe = Bench(workload=workload)
    maybe_servers = Colocated(recipe, preset, address=os.environ["ADDRESS"], secret="bench") if num_replicas else None
    trainer = Trainer(
        preset=preset,
        recipe=recipe,
        feed=MemoryFeed(workload),
        run=cast(RunRecord, None),
        record=Record(key="bench"),
        saver=cast(CheckpointSaver, None),
        events=None,
        rank=Rank(rank=workload.rank, world_size=workload.world_size, token=1, device=CPU),
        servers=maybe_servers,
    )
    if maybe_servers is not None:
        maybe_servers.can_go_on(None, nodes=range(workload.world_size))
        maybe_servers.begin(trainer.state, token=1, rank=workload.rank)
    while True:
        trainer.train_step()
        yield


if __name__ == "__main__":
    mode, *numbers = sys.argv[2].split("-")
    replicas, shards, *_ = [*map(int, numbers), 0, 0]
    serve(
        lambda workload: steps(
            workload, "fast" if mode == "fast" else "exact", num_replicas=replicas, num_shards=shards
        )
    )
