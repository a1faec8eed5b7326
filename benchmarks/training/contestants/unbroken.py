"""This library, in exact or fast mode: whole steps of its Trainer, ledger included."""

from __future__ import annotations

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
from training.step import Rank

NUM_STEPS = 10**6


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


def steps(workload: Workload, mode: Literal["exact", "fast"]) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    fill_new_memory(False)  # as Trainer.train does after its first step
    train = TrainConfig(
        steps=NUM_STEPS,
        checkpoint_every_steps=NUM_STEPS,  # none: there is no store
        batch_size=VIRTUAL_WORKERS * SAMPLES_PER_MICROBATCH,
        virtual_workers=VIRTUAL_WORKERS,
        clip_norm=CLIP_NORM,
        mode=mode,
    )
    preset = Preset(
        name="bench",
        recipe="bench:Bench",
        data=DataConfig(name="bench", source="nowhere", format="files"),
        train=train,
        launch=LaunchConfig(nodes=1),
        seed=SEED,
    )
    trainer = Trainer(
        preset=preset,
        recipe=Bench(workload=workload),
        feed=MemoryFeed(workload),
        run=cast(RunRecord, None),
        record=Record(key="bench"),
        saver=cast(CheckpointSaver, None),
        events=None,
        rank=Rank(rank=workload.rank, world_size=workload.world_size, token=1, device=torch.device("cpu")),
    )
    while True:
        trainer.train_step()
        yield


if __name__ == "__main__":
    serve(lambda workload: steps(workload, "exact" if sys.argv[2] == "exact" else "fast"))
