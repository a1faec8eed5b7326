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
PLACES, WIDTH, NUM_HEADS = 4, 8, 4
_failures: list[int] = []
"""In this process."""


class Trap(Block):
    """A block that fails while it is armed: where the model is whole, and else on one rank alone."""

    way = ""
    dies_at = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.dies_at and x.shape[1] < PLACES and dist.get_rank() == 1 and not Path(self.dies_at).exists():
            Path(self.dies_at).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        is_there = x.shape[1] == PLACES or dist.get_rank() == 1
        if self.way == "one forward" and is_there:
            raise ValueError("what is this?")
        if self.way == "one once" and is_there and not _failures:
            _failures.append(POISON)
            raise ValueError("by chance")
        if self.way == "one backward" and is_there:
            x.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation
        return super().forward(x)


class Places(nn.Module):
    """[batch, 5] to [batch, 3], over a sequence of the first four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Parameter(torch.randn(WIDTH))
        self.position = nn.Parameter(torch.randn(PLACES, WIDTH))
        self.blocks = nn.Sequential(Block(WIDTH, NUM_HEADS), Trap(WIDTH, NUM_HEADS))
        self.head = nn.Parameter(torch.randn(NUM_CLASSES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(x[:, :PLACES, None] * self.widen + self.position).mean(dim=1)
        return (hidden.unsqueeze(1) * self.head).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class InTensors(Tiny):
    """`fails` says how, and where: "loss", "forward", "backward"; or "one forward", "one backward", "one once"."""

    fails: str = ""
    dies_at: str = ""
    """A file that one rank makes as it first computes a part of the model, with which it dies."""

    def model(self) -> nn.Module:
        return Places()

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Places)
        return tuple(model.blocks)

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
        trap = self.blocks(model)[1]
        assert isinstance(trap, Trap)
        trap.way = self.fails if is_poisoned else ""
        trap.dies_at = self.dies_at
        loss = super().loss(model, batch)
        trap.way = ""
        if self.fails == "backward" and is_poisoned:
            loss.register_hook(_fail)  # type: ignore[no-untyped-call]  # no annotation
        return loss * torch.nan if self.fails == "loss" and is_poisoned else loss


def _fail(gradient: Tensor) -> Tensor:
    raise ValueError("whither?")
