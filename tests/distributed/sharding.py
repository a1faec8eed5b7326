"""Trainings with sharded state, as the loop is to do them. Imported by spawned processes: no fixtures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import TIMEOUT_SECONDS
from tests.distributed.work import digits_reader
from tests.unit.tiny import MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from training.arithmetic.balance import even_shares, ranges
from training.arithmetic.objective import Objective
from training.errors import UserError
from training.layout import Layout
from training.loop import Trainer
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.update import ShardedUpdate
from training.recipe import Recipe
from training.recipes.digits import Digits
from training.recipes.stdlib import Block, ByteTransformer

SEQUENCE = 8


class Skipping(nn.Module):
    """Its first block is left out for some batches; head and embedding are one matrix; activations are recomputed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.byte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens)
        for number, block in enumerate(self.blocks):
            if number or tokens[0, 0] % 2:
                x = checkpoint(block, x, use_reentrant=False)
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class Skips(ByteTransformer):
    def model(self) -> nn.Module:
        return Skipping(self.width)

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Skipping)
        return tuple(model.blocks)


@dataclass(frozen=True, kw_only=True)
class Peeks(ByteTransformer):
    """Reads a block's weights where they are not gathered."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        norms = [p.norm() for p in model.parameters()]
        return super().loss(model, batch) + torch.stack(norms).sum() * 1e-3


@dataclass(frozen=True, kw_only=True)
class Twice(ByteTransformer):
    """Its model is computed anew for each loss, to be surer."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(model, batch) + super().loss(model, batch)


WIDE = {"sequence_bytes": SEQUENCE, "width": 132, "num_layers": 2, "num_heads": 4}
"""Some of its matrices are cut: they have more elements than a block of a norm."""
RECIPES: dict[str, Recipe] = {
    "tiny": Tiny(),
    "digits": Digits(),
    "transformer": ByteTransformer(**WIDE),
    "skips": Skips(sequence_bytes=SEQUENCE, width=16),
    "peeks": Peeks(sequence_bytes=SEQUENCE, width=16),
    "twice": Twice(sequence_bytes=SEQUENCE, width=16),
}


class ShardedTrainer(Trainer):
    """Its steps are in a layout."""

    layout = Layout()

    @cached_property
    def sharded(self) -> Sharded:
        rank, model = self.rank, self.state.model
        self.layout.require(num_ranks=rank.world_size, virtual_workers=self.preset.train.virtual_workers)
        groups = make_groups(self.layout, rank.rank, timeout=timedelta(seconds=TIMEOUT_SECONDS))
        return Sharded(model, self.recipe.blocks(model), layout=self.layout, rank=rank.rank, groups=groups)

    @cached_property
    def reducer(self) -> Any:
        train = self.preset.train
        return ShardedReducer(
            Objective(self.recipe, self.state.model, precision=train.precision),
            self.sharded,
            num_extras=self.extras.num_elements,
            ranges=ranges(even_shares(train.virtual_workers, self.layout.num_feeds)),
        )

    @cached_property
    def updater(self) -> Any:
        return ShardedUpdate(self.state, self.sharded, self.reducer, clip_norm=self.preset.train.clip_norm)


def _texts() -> MemoryReader:
    numbers = np.arange(100 * (SEQUENCE + 1), dtype=np.int64)
    return MemoryReader({"bytes": (numbers * numbers * 7919 % 10007 % 251).astype(np.uint8).reshape(100, -1)})


def trainer_in(recipe: str, rank: int, maybe_layout: Layout | None, train: Mapping[str, Any]) -> Trainer:
    """In a layout; or on one rank, as always."""
    readers = {"tiny": tiny_reader, "digits": digits_reader}
    preset = tiny_preset(steps=1000)
    settings = {"digest_every_steps": 0, "clip_norm": 0.5, **train}
    trainer = make_trainer(
        preset=replace(preset, train=replace(preset.train, **settings)),
        recipe=RECIPES[recipe],
        reader=readers.get(recipe, _texts)(),
        rank=rank,
        world_size=maybe_layout.num_ranks if maybe_layout else 1,
        kind=ShardedTrainer if maybe_layout else Trainer,
    )
    if isinstance(trainer, ShardedTrainer) and maybe_layout:
        trainer.layout = maybe_layout
    return trainer


def train_in(
    rank: int,
    world_size: int,
    recipe: str,
    maybe_layout: Layout | None,
    train: Mapping[str, Any],
    num_steps: int,
    maybe_from: str | None = None,
    maybe_to: str | None = None,
) -> dict[str, Any]:
    """So many steps, from a state in a file, to one in a file, if that is wanted."""
    trainer = trainer_in(recipe, rank, maybe_layout, train)
    if maybe_from:
        tensors = safetensors.torch.load_file(maybe_from)
        trainer.state.load(tensors, step=int(tensors.pop("step")))
    outcomes = [_step(trainer) for _ in range(num_steps)]
    num_weights = sum(p.numel() for p in trainer.state.trained.values())
    told: dict[str, Any] = {"history": outcomes, "num_weights": num_weights}
    if not isinstance(trainer, ShardedTrainer):
        return {**told, **_whole(trainer, maybe_to)}
    told["num_kept"] = sum(piece.numel() for unit in trainer.sharded.units for piece in unit.own_pieces(unit.own))
    told["num_of_optimizer"] = _num_of_optimizer(trainer)
    told["num_whole_bytes"] = sum(memory.nbytes() for unit in trainer.sharded.units for memory in unit._memory)
    with trainer.updater.whole_state():
        told |= _whole(trainer, maybe_to if rank == 0 else None)
    return told


def _num_of_optimizer(trainer: Trainer) -> int:
    kept = [entries["exp_avg"] for entries in trainer.state.optimizer.state.values()]
    return sum(tensor.numel() for tensor in kept)


def _step(trainer: Trainer) -> tuple[float, float, str]:
    assert trainer.updater is not None  # which frees the weights, before the first step
    outcome = trainer.train_step()
    return outcome.loss, outcome.grad_norm, outcome.samples


def _whole(trainer: Trainer, maybe_to: str | None) -> dict[str, Any]:
    if maybe_to:
        tensors = {name: tensor.contiguous().clone() for name, tensor in trainer.state.tensors().items()}
        tensors["step"] = torch.tensor(trainer.state.step)
        safetensors.torch.save_file(tensors, Path(maybe_to))
    return {"state": trainer.state.state_sha256()}


def peek(rank: int, world_size: int) -> str:
    """What a recipe is told that reads a block's weights outside of the block."""
    trainer = trainer_in("peeks", rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    assert trainer.updater is not None  # which frees the weights
    _, batch = trainer.microbatch(rank)
    try:
        trainer.reducer.forward(rank, batch).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def twice(rank: int, world_size: int) -> str:
    """What a recipe is told whose blocks are computed twice."""
    trainer = trainer_in("twice", rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    assert trainer.updater is not None
    _, batch = trainer.microbatch(rank)
    try:
        trainer.reducer.forward(rank, batch)
    except UserError as error:
        return str(error)
    return "nothing"


def refusal(rank: int, world_size: int, kind: str) -> str:
    """What is said of parameters that cannot be cut."""
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(model.weight.double() if kind == "double" else model.weight.detach().t())
    groups = make_groups(Layout(), rank, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    try:
        Sharded(model, (), layout=Layout(), rank=rank, groups=groups)
    except UserError as error:
        return str(error)
    return "nothing"
