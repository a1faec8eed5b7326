"""A recipe: digits, at leisure for as long as a file is there, and not scored for as long as another one is."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from training.recipes.digits import Digits

PAUSE_SECONDS = 0.2
_counted = itertools.count()
"""The microbatches of this process."""


@dataclass(frozen=True, kw_only=True)
class Patient(Digits):
    """Named by its path: a node inherits no variable of a test's."""

    slow_while: str = ""
    num_quick: int = 0
    """So many microbatches of each process are quick in any case."""
    held_while: str = ""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if next(_counted) >= self.num_quick and os.path.exists(self.slow_while):
            time.sleep(PAUSE_SECONDS)
        return super().loss(model, batch)

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        while os.path.exists(self.held_while):
            time.sleep(PAUSE_SECONDS)
        return super().scores(model, batch)
