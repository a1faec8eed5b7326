"""A recipe with embedding tables of some blocks each, of which a step looks a few rows up. Imported by the zygote."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer

from tests.unit.tiny import NUM_CLASSES, Tiny, TinyModel
from training.arithmetic.norm import BLOCK_ELEMENTS

WIDTHS = (4, NUM_CLASSES)
"""Blocks have whole rows of the first table, and not of the second, whose pieces are of three blocks at least."""
NUM_ROWS = (5 * BLOCK_ELEMENTS // WIDTHS[0] + 3, 4 * BLOCK_ELEMENTS // WIDTHS[1])


class LookingUp(TinyModel):
    """[batch, 5] to [batch, 3]."""

    def __init__(self, *, is_sparse: bool) -> None:
        super().__init__()
        self.wide = nn.Embedding(NUM_ROWS[0], WIDTHS[0], sparse=is_sparse)
        self.narrow = nn.Embedding(NUM_ROWS[1], WIDTHS[1], sparse=is_sparse)

    def forward(self, x: Tensor) -> Tensor:
        numbers = (x * 100_000).to(torch.int64).abs()
        numbers[:, 0] = 0  # all look this one up
        wide = self.wide(numbers * 7 % NUM_ROWS[0]).sum(dim=(1, 2))
        return super().forward(x) * wide.tanh()[:, None] + self.narrow(numbers * 13 % NUM_ROWS[1]).sum(dim=1)


class OnlyTables(nn.Module):
    """Has nothing else to train."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(NUM_ROWS[1], NUM_CLASSES, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table((x * 100_000).to(torch.int64).abs() % NUM_ROWS[1]).sum(dim=1)
        return found


@dataclass(frozen=True, kw_only=True)
class Lookup(Tiny):
    """The same records."""

    is_sparse: bool = True
    has_only_tables: bool = False

    def model(self) -> nn.Module:
        return OnlyTables() if self.has_only_tables else LookingUp(is_sparse=self.is_sparse)

    def optimizer(self, model: nn.Module) -> Optimizer:
        return Adagrad(model.parameters(), lr=self.learning_rate, lr_decay=0.01, foreach=False)
