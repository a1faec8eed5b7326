"""A recipe: digits, at leisure for as long as a file is there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from training.recipes.digits import Digits

PAUSE_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Patient(Digits):
    """Named by its path: a node inherits no variable of a test's."""

    slow_while: str = ""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if os.path.exists(self.slow_while):
            time.sleep(PAUSE_SECONDS)
        return super().loss(model, batch)
