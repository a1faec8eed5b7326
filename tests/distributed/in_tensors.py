"""A recipe whose matrices are cut, and that fails on one sample if it is to, on one rank alone or on all. Imported by
the zygote."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.in_blocks import POISON, POISONED
from tests.unit.tiny import NUM_CLASSES, Tiny
from training.recipe import Cut
from training.recipes.stdlib import Block

__all__ = ["POISON", "InTensors"]
PLACES, WIDTH, NUM_HEADS, NUM_BLOCKS = 4, 8, 4, 4
MARK = 1e4
_failures: list[int] = []
"""In this process."""


class Trap(Block):
    """A block that fails `way` on a sample that is marked: where the model is whole, and else on one rank of its stage
    alone, unless it is to be on all."""

    way = ""
    dies_at = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.dies_at and x.shape[1] < PLACES and dist.get_rank() == 1 and not Path(self.dies_at).exists():
            Path(self.dies_at).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        where, _, way = self.way.partition(" ")
        is_there = where == "all" or x.shape[1] == PLACES or dist.get_rank() % 2 == 1
        if self.training and is_there and bool((x.abs() > MARK / 2).any()):
            self._fail(x, way)
        return super().forward(x)

    def _fail(self, x: Tensor, way: str) -> None:
        if way == "forward":
            raise ValueError("what is this?")
        if way == "once" and not _failures:
            _failures.append(POISON)
            raise ValueError("by chance")
        if way == "backward":
            x.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation


class Begin(nn.Module):
    """[batch, 5] to a sequence of the first four numbers. It marks what is to fail, for blocks on whatever rank."""

    def __init__(self, mark: float) -> None:
        super().__init__()
        self.widen = nn.Parameter(torch.randn(WIDTH))
        self.position = nn.Parameter(torch.randn(PLACES, WIDTH))
        self._mark = mark

    def forward(self, x: Tensor) -> Tensor:
        found = x[:, :PLACES, None] * self.widen + self.position
        return found + self._mark * (x == POISONED).all(dim=1)[:, None, None] if self._mark else found


class End(nn.Module):
    """To [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(NUM_CLASSES, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.mean(dim=1).unsqueeze(1) * self.head).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class InTensors(Tiny):
    """`fails` says how, and where: in the loss ("loss", "forward", "backward"); or in a block, on one rank alone or on
    all: "one forward", "one backward", "one once", "all forward at 0", …, which is the last block unless it says
    which."""

    fails: str = ""
    dies_at: str = ""
    """A file that one rank makes as it first computes a part of the model, with which it dies."""

    def model(self) -> nn.Module:
        way, _, maybe_place = self.fails.partition(" at ")
        blocks = [Block(WIDTH, NUM_HEADS) for _ in range(NUM_BLOCKS)]
        trap = blocks[int(maybe_place or NUM_BLOCKS - 1)] = Trap(WIDTH, NUM_HEADS)
        trap.way, trap.dies_at = way, self.dies_at
        return nn.Sequential(Begin(MARK if " " in way else 0.0), *blocks, End())

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return [part for part in self.parts(model) if isinstance(part, Block)]

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, nn.Sequential)
        return tuple(model)

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        return [
            cut
            for block in self.blocks(model)
            if isinstance(block, Block)
            for cut in (
                Cut(columns=block.qkv, rows=block.out, num_units=NUM_HEADS, num_repeats=3),
                Cut(columns=block.up, rows=block.down, num_units=4 * WIDTH),
            )
        ]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        is_poisoned = bool((batch["x"] == POISONED).all(dim=1).any())
        if self.fails == "forward" and is_poisoned:
            raise ValueError("what is this?")
        loss = super().loss(model, batch)
        if self.fails == "backward" and is_poisoned:
            loss.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation
        return loss * torch.nan if self.fails == "loss" and is_poisoned else loss


def _fail(gradient: Tensor) -> Tensor:
    raise ValueError("whither?")
