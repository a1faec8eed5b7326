"""Trainings with sharded state. Imported by spawned processes: no fixtures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.distributed.ranks import TIMEOUT_SECONDS
from tests.distributed.work import ANYHOW, digits_reader
from tests.unit.tiny import CPU, NUM_CLASSES, NUM_INPUTS, MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from training.checkpoints.state import TrainState
from training.config import ParallelConfig
from training.diagnosis.crashes import Crashes
from training.errors import DamagedError, UserError
from training.layout import Layout
from training.loop import Trainer
from training.memory import copies
from training.memory.copies import swapped
from training.memory.handover import Handover
from training.memory.slots import Slots, create_slots
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded
from training.parallel.update import joined
from training.recipe import Recipe
from training.recipes.digits import Digits
from training.recipes.stdlib import Block, ByteTransformer
from training.sharded_loop import ShardedTrainer

SEQUENCE = 8


class Skipping(nn.Module):
    """Its first block is left out for some batches; head and embedding are one matrix; activations are recomputed; a
    parameter is not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width, sparse=True)
        self.scale = nn.Parameter(torch.full((width,), 1.5), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.byte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.byte(tokens) * self.scale
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


@dataclass(frozen=True, kw_only=True)
class Held:
    """What no hook sees through."""

    x: Tensor


class Hiding(Skipping):
    """A block gives its output in an object."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.blocks = nn.ModuleList([HidingBlock(width, 2)])

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks[0](self.byte(tokens)).x)
        return logits


class HidingBlock(Block):
    def forward(self, x: Tensor) -> Any:
        return Held(x=super().forward(x))


@dataclass(frozen=True, kw_only=True)
class Hides(Skips):
    def model(self) -> nn.Module:
        return Hiding(self.width)


@dataclass(frozen=True, kw_only=True)
class OneWeight(Tiny):
    """One rank has all of it, and others nothing."""

    def model(self) -> nn.Module:
        return nn.Linear(NUM_INPUTS, NUM_CLASSES, bias=False)


WIDE = {"sequence_bytes": SEQUENCE, "width": 132, "num_layers": 2, "num_heads": 4}
"""Some of its matrices are cut: they have more elements than a block of a norm."""
RECIPES: dict[str, Recipe] = {
    "tiny": Tiny(),
    "one weight": OneWeight(),
    "digits": Digits(),
    "transformer": ByteTransformer(**WIDE),
    "skips": Skips(sequence_bytes=SEQUENCE, width=16),
    "peeks": Peeks(sequence_bytes=SEQUENCE, width=16),
    "twice": Twice(sequence_bytes=SEQUENCE, width=16),
    "hides": Hides(sequence_bytes=SEQUENCE, width=16),
    "anyhow": ANYHOW,
}


def texts() -> MemoryReader:
    numbers = np.arange(100 * (SEQUENCE + 1), dtype=np.int64)
    return MemoryReader({"bytes": (numbers * numbers * 7919 % 10007 % 251).astype(np.uint8).reshape(100, -1)})


def trainer_in(
    recipe: str,
    rank: int,
    maybe_layout: Layout | None,
    train: Mapping[str, Any],
    maybe_copies: Handover | None = None,
) -> Trainer:
    """In a layout; or on one rank, as always."""
    readers = {"tiny": tiny_reader, "one weight": tiny_reader, "digits": digits_reader}
    preset = tiny_preset(steps=1000)
    settings = {"digest_every_steps": 0, "clip_norm": 0.5, **train}
    layout = maybe_layout or Layout()
    return make_trainer(
        preset=replace(
            preset,
            train=replace(preset.train, **settings),
            launch=replace(preset.launch, nodes=layout.num_ranks),
            parallel=ParallelConfig(shard=layout.shard, copy_every_steps=int(maybe_copies is not None)),
        ),
        recipe=RECIPES[recipe],
        reader=readers.get(recipe, texts)(),
        rank=rank,
        world_size=layout.num_ranks,
        handover=maybe_copies,
        kind=ShardedTrainer if maybe_layout else Trainer,
    )


def sharded_trainer_in(recipe: str, rank: int, layout: Layout, train: Mapping[str, Any]) -> ShardedTrainer:
    """Whose group has begun."""
    trainer = trainer_in(recipe, rank, layout, train)
    assert isinstance(trainer, ShardedTrainer)
    trainer.begin_group()
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
    if isinstance(trainer, ShardedTrainer):
        trainer.begin_group()
    outcomes = [_step(trainer) for _ in range(num_steps)]
    num_weights = sum(p.numel() for p in trainer.state.trained.values())
    told: dict[str, Any] = {"history": outcomes, "num_weights": num_weights}
    if not isinstance(trainer, ShardedTrainer):
        return {**told, **_whole(trainer, maybe_to)}
    told["num_kept"] = sum(piece.numel() for unit in trainer.sharded.units for piece in unit.own_pieces(unit.own))
    told["num_of_optimizer"] = _num_of_optimizer(trainer)
    told["num_whole_bytes"] = sum(memory.nbytes() for unit in trainer.sharded.units for memory in unit._memory)
    with trainer.whole_state():
        told |= _whole(trainer, maybe_to if rank == 0 else None)
    return told


def _num_of_optimizer(trainer: Trainer) -> int:
    kept = [entries["exp_avg"] for entries in trainer.state.optimizer.state.values()]
    return sum(tensor.numel() for tensor in kept)


def _step(trainer: Trainer) -> tuple[float, float, str]:
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
    trainer = sharded_trainer_in("peeks", rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    _, batch = trainer.microbatch(rank)
    try:
        trainer.reducer.forward(rank, batch).item()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told_of_blocks(rank: int, world_size: int, recipe: str) -> str:
    """What a recipe is told whose blocks do not do as they must."""
    trainer = sharded_trainer_in(recipe, rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    _, batch = trainer.microbatch(rank)
    try:
        trainer.reducer.forward(rank, batch)
    except UserError as error:
        return str(error)
    return "nothing"


def lent(rank: int, world_size: int) -> str:
    """The digest of what a rank looks into before a step that killed ranks."""
    trainer = sharded_trainer_in("skips", rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    seen: dict[str, Tensor] = {}

    class Looks:
        def require_survivable(self, workers: Sequence[int], step: int, tensors: Mapping[str, Tensor]) -> None:
            seen.update(tensors)

    trainer._maybe_crashes, trainer._maybe_suspect_step = cast(Crashes, Looks()), 0
    trainer.require_survivable()
    found = TrainState(trainer.recipe, seed=1, device=CPU)
    found.load(seen, step=0)
    return found.weights_digest()


def joined_parts(rank: int, world_size: int, recipe: str) -> tuple[list[str], dict[str, str]]:
    """After two steps: names that the whole state or what the parts make up lacks; and digests of both."""
    trainer = sharded_trainer_in(recipe, rank, Layout(shard=world_size), {"virtual_workers": 2, "batch_size": 4})
    for _ in range(2):
        trainer.train_step()
    own = trainer.updater.part()
    theirs = swapped(own, trainer.state.step, rank=rank, num_ranks=world_size, distance=1)
    found = TrainState(trainer.recipe, seed=2, device=CPU)
    tensors = joined([own, theirs] if rank == 0 else [theirs, own], found)
    with trainer.whole_state():
        missing = sorted(tensors.keys() ^ trainer.state.tensors().keys())
        whole = trainer.state.state_sha256()
    found.load(tensors, step=trainer.state.step, may_keep=True)
    return missing, {"whole": whole, "joined": found.state_sha256()}


COPIES_FAIL: dict[str, tuple[Any, str, Any]] = {
    "arrive otherwise": (copies, "fast_digest", mock.Mock(return_value="f" * 32)),
    "do not fit": (TrainState, "load", mock.Mock(side_effect=DamagedError("other names"))),
}


def take_copies(rank: int, world_size: int, recipe: str, maybe_fault: str | None = None) -> tuple[bool, int, str]:
    """Whether a rank of the next group has taken up copies of the first step, where it is, and the digest of its
    state. The fault befalls the last rank alone."""
    descriptors = create_slots()
    kept = Handover(Slots(descriptors), run_key="key")
    trainers = [
        trainer_in(
            recipe, rank, Layout(shard=world_size), {"virtual_workers": world_size, "batch_size": 2 * world_size}, kept
        )
        for _ in range(2)
    ]
    before, after = (trainer for trainer in trainers if isinstance(trainer, ShardedTrainer))
    before.begin_group()
    before.train_step()
    kept.note(1, {})
    before.copy()
    fault: AbstractContextManager[Any] = nullcontext()
    if maybe_fault and rank == world_size - 1:
        owner, name, stand_in = COPIES_FAIL[maybe_fault]
        fault = mock.patch.object(owner, name, stand_in)
    with fault:
        maybe_entries = after.maybe_take_copies(0)
    for fd in descriptors:
        os.close(fd)
    return maybe_entries is not None, after.state.step, after.state.state_sha256()


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
