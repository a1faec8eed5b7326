"""What every contestant trains: the same model, samples, microbatches, clipping and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VIRTUAL_WORKERS = 8
SAMPLES_PER_MICROBATCH = 2
SEQUENCE_BYTES = 64
NUM_DATA_STEPS = 16
CLIP_NORM = 1.0
LEARNING_RATE = 1e-3
SEED = 3
WIDTHS = {"0.5M": 96, "3M": 256, "13M": 512}
"""By the number of parameters, about."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A byte-level transformer of a size, and the part of the samples that one of some ranks reads."""

    size: str
    rank: int
    world_size: int

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        return Model(WIDTHS[self.size])

    @cached_property
    def owned(self) -> range:
        return range(
            self.rank * VIRTUAL_WORKERS // self.world_size, (self.rank + 1) * VIRTUAL_WORKERS // self.world_size
        )

    @cached_property
    def _bytes(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        shape = (NUM_DATA_STEPS, VIRTUAL_WORKERS, SAMPLES_PER_MICROBATCH, SEQUENCE_BYTES + 1)
        return np.random.default_rng(SEED).integers(0, 256, shape, dtype=np.uint8)

    def arrays(self, step: int, worker: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """One virtual worker's samples of a step."""
        found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = self._bytes[step % NUM_DATA_STEPS, worker]
        return found

    def microbatches(self, step: int) -> Sequence[Tensor]:
        """This rank's microbatches of a step."""
        return [torch.from_numpy(self.arrays(step, worker)) for worker in self.owned]

    def steps(self) -> Iterator[Sequence[Tensor]]:
        step = 0
        while True:
            yield self.microbatches(step)
            step += 1


class Model(nn.Module):
    """Bytes [batch, sequence + 1] to the mean loss of predicting each from those before."""

    def __init__(self, width: int, num_layers: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(SEQUENCE_BYTES, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(SEQUENCE_BYTES), persistent=False)

    def forward(self, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
        tokens = (batch if isinstance(batch, Tensor) else batch["bytes"]).to(torch.int64)
        hidden = self.layers(self.byte(tokens[:, :-1]) + self.position, mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens[:, 1:].flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
