"""Handwritten digits: 8x8 grey pixels to one of ten classes, by a small convolutional network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from training.recipe import Recipe, Record, Sample
from training.recipes.schedules import Schedule, warmup_then


@dataclass(frozen=True, kw_only=True)
class Digits(Recipe):
    """Records are CSV lines: 64 pixels from 0 to 16, then the label."""

    num_channels: int = 24
    dropout: float = 0.1
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    schedule: Schedule = "cosine"

    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "max", "loss": "min"}

    def encode(self, record: Record) -> Iterable[Sample]:
        values = [float(text) for text in record.data.split(b",")]
        if len(values) != 65 or not 0 <= values[64] <= 9:
            raise ValueError(f"expected 64 pixels and a label from 0 to 9, got {len(values)} values")
        pixels = np.array(values[:64], dtype=np.uint8).reshape(8, 8)
        yield {"pixels": pixels, "label": np.array(values[64], dtype=np.int64)}

    def model(self) -> nn.Module:
        width = self.num_channels
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(2 * width * 16, 10),
        )

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Shape [batch, 1, 8, 8], float32 from 0 to 1."""
        return batch["pixels"].unsqueeze(1).to(torch.float32) / 16.0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(self.inputs(batch)), batch["label"])

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(self.inputs(batch))
        predicted = logits.argmax(dim=1)
        return {
            "loss": F.cross_entropy(logits, batch["label"], reduction="none"),
            "accuracy": (predicted == batch["label"]).to(torch.float32),
            "label": batch["label"],
            "predicted": predicted,
            "confidence": logits.softmax(dim=1).amax(dim=1),
        }

    def optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.01, foreach=False)

    def learning_rate_scale(self, step: int, num_steps: int) -> float:
        return warmup_then(self.schedule, step, num_steps, warmup_steps=self.warmup_steps)
