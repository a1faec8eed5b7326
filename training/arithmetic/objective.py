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
        self._device_type = next(model.parameters(), torch.empty(0)).device.type

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A scalar."""
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss: object = self.recipe.loss(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise DeterministicError(
                f"the recipe's loss() gave {_described(loss)}: it must be a scalar tensor that depends on the model's"
                " parameters"
            )
        return loss.reshape(()).float()


def _described(loss: object) -> str:
    if not isinstance(loss, Tensor):
        return type(loss).__name__
    return f"a tensor of shape {list(loss.shape)}{'' if loss.requires_grad else ' that depends on no parameter'}"


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
def recipe_errors(where: str, ids: Sequence[str] = ()) -> Iterator[None]:
    """Say where the recipe's own code failed, and on which samples. Memory that runs out is not its doing."""
    try:
        yield
    except UnbrokenError:
        raise
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        samples = f"; samples {', '.join(ids[:8])}" if ids else ""
        raise DeterministicError(f"{where}: the recipe failed: {type(error).__name__}: {error}{samples}") from error


def is_lack_of_memory(error: Exception) -> bool:
    """However Python and torch say it; torch on a CPU has no class for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
