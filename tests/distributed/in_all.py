"""A recipe that goes with every layout of up to eight ranks. Imported by the zygote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.unit.tiny import NUM_CLASSES, NUM_INPUTS, Tiny
from training.recipe import Cut
from training.recipes.stdlib import Block

WIDTH, NUM_HEADS, NUM_BLOCKS = 8, 4, 4


class Widen(nn.Module):
    """[batch, 5] to [batch, 5, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Parameter(torch.randn(WIDTH))
        self.position = nn.Parameter(torch.randn(NUM_INPUTS - 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-1, None] * self.widen + self.position


class Head(nn.Module):
    """[batch, places, width] to [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(dim=1).unsqueeze(1) * self.weight).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class InAll(Tiny):
    learning_rate: float = 0.01

    def model(self) -> nn.Module:
        return nn.Sequential(Widen(), *(Block(WIDTH, NUM_HEADS) for _ in range(NUM_BLOCKS)), Head())

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        return tuple(model.children())

    def blocks(self, model: nn.Module) -> Sequence[Block]:
        return tuple(part for part in model.children() if isinstance(part, Block))

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        return [
            cut
            for block in self.blocks(model)
            for cut in (
                Cut(columns=block.qkv, rows=block.out, num_units=NUM_HEADS, num_repeats=3),
                Cut(columns=block.up, rows=block.down, num_units=4 * WIDTH),
            )
        ]
