"""Tiny exported programs."""

from __future__ import annotations

import io

import torch
from torch import nn

from tests.serving.models import NUM_FIELDS


class Adder(nn.Module):
    """Adds a constant, so that an answer proves which version it came from. Above 1000 it raises."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))
        self.register_buffer("table", torch.zeros(1001))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.constant + self.table[x.long().clamp(min=0)]


def program(constant: float) -> bytes:
    """The file of a version, without an example inside, as `tasks.register` writes it."""
    example = (torch.zeros(2, NUM_FIELDS),)
    exported = torch.export.export(
        Adder(constant).eval(), example, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    exported._example_inputs = ((None,), {})
    file = io.BytesIO()
    torch.export.save(exported, file)
    return file.getvalue()
