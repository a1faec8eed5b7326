"""The same training as a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.recovery.workload import WIDTH, Model, loss_of, optimizer_of
from training.recipe import Recipe, Record, Sample, Table


@dataclass(frozen=True, kw_only=True)
class Sized(Recipe):
    """Each record is a number, of which come as many samples as the bench needs."""

    num_bytes: int
    num_samples: int = 64

    def encode(self, record: Record) -> Iterable[Sample | Table]:
        random = np.random.default_rng(int(record.data))
        return Table({"x": random.standard_normal((self.num_samples, WIDTH), dtype=np.float32)})

    def model(self) -> nn.Module:
        return Model(self.num_bytes)

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"]

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return loss_of(model, batch["x"])

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"]
        return {"loss": (model(x) - x.flip(1)).square().mean(dim=1)}

    def optimizer(self, model: nn.Module) -> Optimizer:
        return optimizer_of(model)
