"""The same training as a recipe."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from benchmarks.recovery.workload import WIDTH, Model, loss_of, optimizer_of
from training.recipe import Recipe, Record, Sample, Table

PACE_FILE = "BENCH_PACE_FILE"


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


@dataclass(frozen=True, kw_only=True)
class Paced(Sized):
    """Takes as long for a microbatch as the host's file says, in seconds, and next to no processor time."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(float(Path(os.environ[PACE_FILE]).read_text()))
        assert isinstance(model, Model)
        return F.mse_loss(model.narrow(model.wide(batch["x"])), batch["x"])
