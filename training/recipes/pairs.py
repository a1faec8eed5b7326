"""What goes with what: two embedding tables, trained to tell the true partner from others. A recommender, in small.

(Skip-gram with negative samples: Mikolov et al., NIPS'13; names hashed to rows: Weinberger et al., ICML'09.)
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adagrad, Optimizer

from training.recipe import Recipe, Record, Sample, Table

WORD = re.compile(rb"[A-Za-z_]\w+")
STRIDE = 7919
"""From one word to the next that stands in for a false partner: a prime."""


class PairModel(nn.Module):
    """Rows [batch, 1 + partners] int64 to how well each partner goes with the first, [batch, partners]."""

    def __init__(self, *, num_rows: int, width: int) -> None:
        super().__init__()
        self.firsts = nn.Embedding(num_rows, width, sparse=True)
        self.partners = nn.Embedding(num_rows, width, sparse=True)
        self.sharpness = nn.Parameter(torch.ones(()))
        for table in (self.firsts, self.partners):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(self, rows: Tensor) -> Tensor:
        fit: Tensor = (self.firsts(rows[:, :1]) * self.partners(rows[:, 1:])).sum(dim=2)
        return fit * self.sharpness


@dataclass(frozen=True, kw_only=True)
class Pairs(Recipe):
    """A sample is `rows`: of the first, its true partner, and `num_others` that are none."""

    num_rows: int = 65_536
    """Of each of the two tables."""
    width: int = 32
    num_others: int = 7
    learning_rate: float = 0.3

    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "max", "reciprocal_rank": "max", "loss": "min"}

    def row(self, name: bytes) -> int:
        return zlib.crc32(name) % self.num_rows

    def model(self) -> nn.Module:
        return PairModel(num_rows=self.num_rows, width=self.width)

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["rows"].to(torch.int64)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return _cross_entropy(model(self.inputs(batch))).mean()

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fits = model(self.inputs(batch))
        rank = 1 + (fits[:, 1:] >= fits[:, :1]).sum(dim=1)
        return {
            "loss": _cross_entropy(fits),
            "accuracy": (rank == 1).to(torch.float32),
            "reciprocal_rank": 1 / rank.to(torch.float32),
        }

    def optimizer(self, model: nn.Module) -> Optimizer:
        return Adagrad(model.parameters(), lr=self.learning_rate, foreach=False)


def _cross_entropy(fits: Tensor) -> Tensor:
    """Of each sample, the true partner being the first."""
    return F.cross_entropy(fits, torch.zeros(len(fits), dtype=torch.int64, device=fits.device), reduction="none")


@dataclass(frozen=True, kw_only=True)
class Words(Pairs):
    """Records are whole files of text; a word's partner is one of the next `window`, and others are further on."""

    window: int = 3

    def encode(self, record: Record) -> Iterable[Table]:
        """The last words, which nothing follows, are nobody's firsts."""
        rows = np.array([self.row(word) for word in WORD.findall(record.data)], dtype=np.int32)
        firsts = np.arange(len(rows) - self.window)
        if len(firsts) > 0:
            partners = firsts + 1 + firsts % self.window
            others = firsts[:, None] + STRIDE * np.arange(1, self.num_others + 1)
            places = np.concatenate([firsts[:, None], partners[:, None], others % len(rows)], axis=1)
            yield Table({"rows": rows[places]})


@dataclass(frozen=True, kw_only=True)
class Clicks(Pairs):
    """Records are lines, `user,item`; others are any items."""

    def encode(self, record: Record) -> Iterable[Sample]:
        user, comma, item = record.data.strip().partition(b",")
        if not (user and comma and item):
            raise ValueError("expected a user and an item")
        others = [self.row(b"%b/%d" % (record.data, number)) for number in range(self.num_others)]
        yield {"rows": np.array([self.row(user), self.row(item), *others], dtype=np.int32)}
