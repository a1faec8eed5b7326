"""Trainings in a pipeline, step by step. Imported by spawned processes: no fixtures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import TIMEOUT_SECONDS
from tests.distributed.work import ANYHOW
from tests.unit.tiny import CPU, MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from tests.waiting import wait_until
from training.arithmetic.objective import seed_streams
from training.config import ParallelConfig
from training.layout import Layout, Schedule
from training.loop import Trainer
from training.parallel.passing import Passing
from training.parallel.replica import make_replica_groups
from training.recipe import Recipe
from training.recipes.stdlib import ByteTransformer
from training.replica_loop import ReplicaTrainer

SEQUENCE = 8
WIDTH = 8


class Widen(nn.Module):
    """[batch, 5] to [batch, width] by a matrix that is not trained, and what later parts scale by."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Parameter(torch.randn(5, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.fixed, (x[:, 0] > 0).to(torch.int64) + 1


class Layer(nn.Module):
    """Draws random numbers of all kinds, has buffers of both, computes anew as it goes back, and gives its columns one
    after another in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.25)

    def forward(self, values: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, scale = values
        grown = checkpoint(self._grown, x, use_reentrant=False)
        noise = np.random.standard_normal() + random.gauss(0, 1)
        return (x + grown * (1 + 0.01 * noise)).t().contiguous().t(), scale

    def _grown(self, x: Tensor) -> Tensor:
        grown: Tensor = self.dropout(self.linear(self.norm(x)))
        return grown


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3)

    def forward(self, values: tuple[Tensor, Tensor]) -> Tensor:
        x, scale = values
        logits: Tensor = self.linear(x) * scale.unsqueeze(1)
        return logits


@dataclass(frozen=True, kw_only=True)
class Noisy(Tiny):
    """All that a stage may not keep to itself."""

    num_layers: int = 4

    def model(self) -> nn.Module:
        return nn.Sequential(Widen(), *(Layer() for _ in range(self.num_layers)), Narrow())

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return self.parts(model)[1:-1]

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, nn.Sequential)
        return tuple(model)


RECIPES: dict[str, Recipe] = {
    "noisy": Noisy(),
    "transformer": ByteTransformer(sequence_bytes=SEQUENCE, width=16, num_layers=4, num_heads=2),
    "wide": ByteTransformer(sequence_bytes=SEQUENCE, width=132, num_layers=2, num_heads=4),
    "anyhow": ANYHOW,
}
"""The last two have matrices of more elements than a block of a norm."""


def _texts() -> MemoryReader:
    numbers = np.arange(100 * (SEQUENCE + 1), dtype=np.int64)
    return MemoryReader({"bytes": (numbers * numbers * 7919 % 10007 % 251).astype(np.uint8).reshape(100, -1)})


def trainer_in(
    recipe: str, rank: int, maybe_layout: Layout | None, schedule: Schedule, train: Mapping[str, Any]
) -> Trainer:
    """In a layout; or on one rank, as always."""
    layout = maybe_layout or Layout()
    preset = tiny_preset(steps=1000)
    settings = {"digest_every_steps": 0, "clip_norm": 0.5, **train}
    trainer = make_trainer(
        preset=replace(
            preset,
            train=replace(preset.train, **settings),
            launch=replace(preset.launch, nodes=layout.num_ranks),
            parallel=ParallelConfig(pipeline=layout.pipeline, schedule=schedule),
        ),
        recipe=RECIPES[recipe],
        reader=tiny_reader() if recipe == "noisy" else _texts(),
        rank=rank,
        world_size=layout.num_ranks,
        kind=ReplicaTrainer if maybe_layout else Trainer,
    )
    if isinstance(trainer, ReplicaTrainer):
        assert trainer.layout == layout
    return trainer


def pipelined(
    rank: int,
    world_size: int,
    recipe: str,
    maybe_layout: Layout | None,
    schedule: Schedule,
    train: Mapping[str, Any],
    num_steps: int,
    maybe_from: str | None = None,
    maybe_to: str | None = None,
) -> dict[str, Any]:
    """So many steps, from a state in a file, to one in a file, if that is wanted."""
    trainer = trainer_in(recipe, rank, maybe_layout, schedule, train)
    if maybe_from:
        tensors = safetensors.torch.load_file(maybe_from)
        trainer.state.load(tensors, step=int(tensors.pop("step")))
    num_of_model = sum(p.numel() for p in trainer.state.model.parameters())
    if isinstance(trainer, ReplicaTrainer):
        trainer.begin_group()  # which frees the weights of other stages
    outcomes = [trainer.train_step() for _ in range(num_steps)]
    told: dict[str, Any] = {
        "history": [(outcome.loss, outcome.grad_norm, outcome.samples) for outcome in outcomes],
        "num_of_model": num_of_model,
        "num_kept": sum(p.numel() for p in trainer.state.model.parameters()),
    }
    if not isinstance(trainer, ReplicaTrainer):
        return {**told, **_whole(trainer, maybe_to)}
    kept = [entries["exp_avg"] for entries in trainer.state.optimizer.state.values()]
    told["num_of_optimizer"] = sum(tensor.numel() for tensor in kept)
    with trainer.updater.whole_state():
        told |= _whole(trainer, maybe_to if rank == 0 else None)
    assert sum(p.numel() for p in trainer.state.model.parameters()) == told["num_kept"]
    return told


def _whole(trainer: Trainer, maybe_to: str | None) -> dict[str, Any]:
    if maybe_to:
        tensors = {name: tensor.contiguous().clone() for name, tensor in trainer.state.tensors().items()}
        tensors["step"] = torch.tensor(trainer.state.step)
        safetensors.torch.save_file(tensors, Path(maybe_to))
    return {"state": trainer.state.state_sha256()}


def tensors_of_all_kinds(rank: int, world_size: int) -> list[bool]:
    """From stage 0 to stage 1: whether what came is what was sent."""
    groups = make_replica_groups(Layout(pipeline=world_size), rank, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    passing = Passing(groups.stages)
    seed_streams(3, CPU)
    columns, row = torch.randn(3, 4).t(), torch.randn(4).expand(5, 4)
    sent = [columns, row, torch.randn(6, 4)[::2, :3], torch.tensor(2.5), torch.empty(0, 3), torch.randn(2).bfloat16()]
    sent += [torch.arange(7), torch.tensor([True, False]), torch.randn(2, 3, requires_grad=True)]
    found = []
    for _ in range(2):
        if rank == 0:
            passing.send(7, sent, stage=1)
            continue
        for came, one in zip(passing.receive(7, stage=0) or [], sent, strict=True):
            found.append(torch.equal(came, one) and came.stride() == one.stride() and came.dtype == one.dtype)
            found.append(came.requires_grad == one.requires_grad)
    wait_until(lambda: all(future.done() for future in passing._sending), what="memory to be free")
    passing.wait()
    passing.close()
    return found


def other_forms(rank: int, world_size: int) -> list[list[int] | None]:
    """Shapes of what arrives, one message after another; one is nothing."""
    groups = make_replica_groups(Layout(pipeline=world_size), rank, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    passing = Passing(groups.stages)
    sent = [torch.zeros(2, 3), None, torch.zeros(2, 3), torch.zeros(3, 3)]
    found: list[list[int] | None] = []
    for maybe_tensor in sent:
        if rank == 0:
            passing.send(7, None if maybe_tensor is None else [maybe_tensor], stage=1)
        else:
            maybe_received = passing.receive(7, stage=0)
            found.append(None if maybe_received is None else list(maybe_received[0].shape))
    passing.wait()
    passing.close()
    return found
