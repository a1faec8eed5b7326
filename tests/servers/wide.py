"""A recipe whose parameters are more than one block, so that servers have pieces of them. Imported by the zygote."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.unit.tiny import NUM_CLASSES, NUM_INPUTS, Tiny, TinyModel
from training.arithmetic.norm import BLOCK_ELEMENTS

NUM_ROWS = 5 * BLOCK_ELEMENTS // (2 * NUM_INPUTS)


class WideModel(TinyModel):
    """[batch, 5] to [batch, 3]; a table of two and a half blocks beside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(NUM_CLASSES - 1, NUM_ROWS, NUM_INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        seen = (x[:, None, None, :] * self.table).tanh().sum(dim=3).mean(dim=2)
        return super().forward(x) + torch.cat([seen, seen.sum(dim=1, keepdim=True)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Wide(Tiny):
    """The same records."""

    def model(self) -> nn.Module:
        return WideModel()
