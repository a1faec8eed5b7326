"""The recipe of NAME: how a record becomes a sample, the model, the loss and the scores."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from training.recipe import Recipe as BaseRecipe
from training.recipe import Record, Sample


@dataclass(frozen=True, kw_only=True)
class Recipe(BaseRecipe):
    """Points in the plane to one of two classes. The fields come from [hyperparameters]."""

    width: int = 48
    learning_rate: float = 1e-2

    metrics: ClassVar[Mapping[str, str]] = {"accuracy": "max", "loss": "min"}

    def encode(self, record: Record) -> Iterable[Sample]:
        """One record gives one sample. Whatever is wrong with it, say so with a ValueError."""
        point = json.loads(record.data)
        yield {
            "point": np.array([point["x"], point["y"]], dtype=np.float32),
            "label": np.array(point["label"], dtype=np.int64),
        }

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(2, self.width), nn.Tanh(), nn.Linear(self.width, self.width), nn.Tanh(), nn.Linear(self.width, 2)
        )

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["point"]

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
        return AdamW(model.parameters(), lr=self.learning_rate, foreach=False)
