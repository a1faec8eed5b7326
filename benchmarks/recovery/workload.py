"""What every contestant trains: a state of any size, of which little changes in a step, so that steps are short and do
not hide what recovery costs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEGABYTE = 1_000_000
WIDTH = 64
HIDDEN = 256
NUM_PASSES = 24
MICROBATCHES = 6
SAMPLES_PER_MICROBATCH = 64
LEARNING_RATE = 1e-3
CHECKPOINT_EVERY_STEPS = 1000
DETECTION_SECONDS = 2.0
"""Set alike for all: how long a rank or a node may be silent."""
_ADAM_COPIES = 3


class Model(nn.Module):
    """[batch, 64] to [batch, 64]: a small network, passed many times, on top of a frozen table that makes up the size.

    `num_bytes` is that of the whole state, optimizer included.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        trained = _ADAM_COPIES * 4 * sum(p.numel() for p in self.parameters())
        rows = max(1, (num_bytes - trained) // (4 * WIDTH))
        self.table = nn.Parameter(torch.zeros(rows, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.table[0]
        for _ in range(NUM_PASSES):
            hidden = hidden + 0.1 * torch.tanh(self.narrow(F.gelu(self.wide(hidden))))
        return hidden


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over a batch."""
    return F.mse_loss(model(x), x.flip(1))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
