"""A byte-level transformer language model: source files cut into sequences, each byte predicted from those before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from training.recipe import Cut, Recipe, Record, Sample
from training.recipes.schedules import Schedule, warmup_then


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm (GPT-2's order)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width = {width} is no multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.head_size = width // num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, sequence, width] to the same shape, with as many heads as there are."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(2, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        grown: Tensor = self.down(F.gelu(self.up(self.norm_feed_forward(x))))
        return x + grown


class Embedding(nn.Module):
    """What a transformer does before its blocks, with weights that are its own."""

    def __init__(self, byte: nn.Embedding, position: nn.Parameter) -> None:
        super().__init__()
        self.byte = byte
        self.position = position

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.byte(tokens) + self.position
        return x


class Transformer(nn.Module):
    """Bytes [batch, sequence] int64 to logits [batch, sequence, 256]."""

    def __init__(self, *, sequence_bytes: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        nn.init.normal_(self.byte.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(sequence_bytes, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.byte(tokens) + self.position)))
        return logits


@dataclass(frozen=True, kw_only=True)
class ByteTransformer(Recipe):
    """Records are whole files; a sample is `sequence_bytes` bytes and the byte after each."""

    sequence_bytes: int = 128
    num_layers: int = 2
    width: int = 96
    num_heads: int = 4
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    schedule: Schedule = "cosine"

    metrics: ClassVar[Mapping[str, str]] = {"bits_per_byte": "min", "accuracy": "max", "loss": "min"}

    def encode(self, record: Record) -> Iterable[Sample]:
        """The last piece of a file is dropped if it is shorter than a sequence."""
        data = np.frombuffer(record.data, dtype=np.uint8)
        for start in range(0, len(data) - self.sequence_bytes, self.sequence_bytes):
            yield {"bytes": data[start : start + self.sequence_bytes + 1]}

    def model(self) -> nn.Module:
        return Transformer(
            sequence_bytes=self.sequence_bytes,
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Transformer)
        return tuple(model.blocks)

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, Transformer)
        return Embedding(model.byte, model.position), *model.blocks, model.norm, model.head

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        assert isinstance(model, Transformer)
        return [
            cut
            for block in model.blocks
            if isinstance(block, Block)
            for cut in (
                Cut(columns=block.qkv, rows=block.out, num_units=block.num_heads, num_repeats=3),
                Cut(columns=block.up, rows=block.down, num_units=block.up.out_features),
            )
        ]

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["bytes"][:, :-1].to(torch.int64)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._cross_entropy(model(self.inputs(batch)), batch).mean()

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(self.inputs(batch))
        loss = self._cross_entropy(logits, batch).mean(dim=1)
        hits = logits.argmax(dim=2) == batch["bytes"][:, 1:]
        return {"loss": loss, "bits_per_byte": loss / math.log(2), "accuracy": hits.to(torch.float32).mean(dim=1)}

    def _cross_entropy(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        targets = batch["bytes"][:, 1:].to(torch.int64)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    def optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.05, foreach=False)

    def learning_rate_scale(self, step: int, num_steps: int) -> float:
        return warmup_then(self.schedule, step, num_steps, warmup_steps=self.warmup_steps)
