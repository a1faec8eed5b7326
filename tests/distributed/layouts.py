"""One training in any layout, as the loop does it. Imported by spawned processes: no fixtures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch

from tests.distributed.pipelining import pipelined
from tests.distributed.sharding import texts, train_in
from tests.distributed.tensoring import in_tensors, whole
from tests.distributed.work import ANYHOW
from tests.unit.tiny import make_trainer, tiny_preset
from training.layout import Layout, Schedule

TRAIN: Mapping[str, Any] = {"virtual_workers": 8, "batch_size": 16}
RECIPE = "anyhow"


@dataclass(frozen=True, kw_only=True)
class Case:
    layout: Layout
    maybe_schedule: Schedule | None = None

    @property
    def is_exact(self) -> bool:
        return self.layout.tensor == 1

    def __str__(self) -> str:
        return f"{self.layout}, {self.maybe_schedule}" if self.maybe_schedule else str(self.layout)


def trained(
    rank: int, world_size: int, case: Case, num_steps: int, maybe_from: str | None, maybe_to: str | None
) -> dict[str, Any]:
    """So many steps, from a state in a file, to one in a file, if that is wanted."""
    about = (TRAIN, num_steps, maybe_from, maybe_to)
    if case.layout.tensor > 1:
        return in_tensors(rank, world_size, RECIPE, case.layout, True, *about, schedule=case.maybe_schedule or "1f1b")
    if case.maybe_schedule is not None:
        return pipelined(rank, world_size, RECIPE, case.layout, case.maybe_schedule, *about)
    if case.layout.shard > 1:
        return train_in(rank, world_size, RECIPE, case.layout, *about)
    return _in_replicas(rank, world_size, num_steps, maybe_from, maybe_to)


def _in_replicas(
    rank: int, world_size: int, num_steps: int, maybe_from: str | None, maybe_to: str | None
) -> dict[str, Any]:
    preset = tiny_preset(steps=1000, digest_every_steps=0, **TRAIN)
    trainer = make_trainer(preset=preset, recipe=ANYHOW, reader=texts(), rank=rank, world_size=world_size)
    if maybe_from:
        tensors = safetensors.torch.load_file(maybe_from)
        trainer.state.load(tensors, step=int(tensors.pop("step")))
    outcomes = [trainer.train_step() for _ in range(num_steps)]
    history = [(outcome.loss, outcome.grad_norm, outcome.samples) for outcome in outcomes]
    return {"history": history, **whole(trainer, maybe_to if rank == 0 else None)}
