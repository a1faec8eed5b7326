"""A recipe all of whose state is trained, and so lies on servers. Imported by the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from benchmarks.recovery.contestants.unbroken import Sized
from benchmarks.recovery.workload import LEARNING_RATE, WIDTH

ADAM_COPIES = 3


class Table(nn.Module):
    """[batch, 64] to [batch, 64]: little is computed, and every element has a gradient and is updated."""

    def __init__(self, num_bytes: int) -> None:
        """Of parameters and what AdamW keeps."""
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(max(1, num_bytes // (ADAM_COPIES * 4 * WIDTH)), WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows.mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Trained(Sized):
    """The samples of the recovery's benches."""

    def model(self) -> nn.Module:
        return Table(self.num_bytes)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.mse_loss(model(batch["x"]), batch["x"].flip(1))

    def optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=LEARNING_RATE)
