"""A recipe to be copied beside a preset: five records each make it fail in a way of their own."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from training.recipe import Recipe, Record, Sample

RAISES, NOT_FINITE, DIES, DIES_DECODED, NO_SLOPE = 9001, 9002, 9003, 9004, 9005
"""As the first number of a record."""


@dataclass(frozen=True, kw_only=True)
class Poisoned(Recipe):
    """Records are lines of three numbers and a label."""

    def encode(self, record: Record) -> Iterable[Sample]:
        *x, label = (float(text) for text in record.data.split(b","))
        yield {"x": np.array(x, dtype=np.float32), "label": np.array(label, dtype=np.int64)}

    def decode(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        if sample["x"][0] == DIES_DECODED:
            os.kill(os.getpid(), signal.SIGSEGV)
        return sample

    def model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"] / 100

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        marks = {int(mark) for mark in batch["x"][:, 0].tolist()}
        if RAISES in marks:
            raise ValueError("what is this?")
        if DIES in marks:
            ctypes.string_at(0)
        loss = F.cross_entropy(model(self.inputs(batch)), batch["label"])
        if NO_SLOPE in marks:
            loss = loss + (loss * 0).sqrt()  # finite, and its slope is 0 times infinity
        return loss * (torch.nan if NOT_FINITE in marks else 1.0)

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(self.inputs(batch)), batch["label"], reduction="none")}

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=0.1, foreach=False)
