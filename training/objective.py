"""The recipe's loss as the loop needs it: in the preset's precision, with its own random stream, its errors named."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from training.errors import DeterministicError, UnbrokenError
from training.recipe import Recipe


class Objective(nn.Module):
    """The recipe's loss as a module of its own, so that the recipe sees its own model whoever wraps this one."""

    def __init__(self, recipe: Recipe, model: nn.Module, *, precision: str) -> None:
        super().__init__()
        self.recipe = recipe
        self.model = model
        self.precision = precision

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.recipe.loss(self.model, batch).float()


def stream_seed(seed: int, step: int, worker: int) -> int:
    """The seed of the random stream of one virtual worker in one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{worker}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_streams(seed: int, device: torch.device) -> None:
    """Torch's, numpy's and Python's own, whichever the recipe uses. (torch.manual_seed also tells devices that are not
    there, at milliseconds a time.)"""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def fill_new_memory(is_on: bool) -> None:
    """Whether torch fills what it allocates, as it does by default under deterministic algorithms."""
    torch.utils.deterministic.fill_uninitialized_memory = is_on  # type: ignore[attr-defined]  # public, but not listed


@contextmanager
def recipe_errors(step: int, worker: int, ids: Sequence[str]) -> Iterator[None]:
    """Name the step and samples when the recipe's own code fails. Memory that runs out is not its doing."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UnbrokenError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # how torch says on a CPU that memory ran out
            raise
        raise DeterministicError(
            f"step {step}, virtual worker {worker}: the recipe failed: {type(error).__name__}: {error};"
            f" samples {', '.join(ids[:8])}"
        ) from error
