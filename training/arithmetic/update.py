"""From mean gradients to the next weights, by every rank the whole of it."""

from __future__ import annotations

from typing import Protocol

import torch

from training.arithmetic.norm import block_norms, clip_factor, norm_of
from training.checkpoints.state import TrainState


class Update(Protocol):
    """Of one step, after its gradients were summed: here, or on servers (training.servers.colocated)."""

    def clip(self) -> float:
        """Scale the gradients; returns the norm before. It is taken block by block, whoever has which."""
        ...

    def apply(self, learning_rate_scale: float) -> None:
        """The optimizer's step."""
        ...


class LocalUpdate:
    """All of it here."""

    def __init__(self, state: TrainState, *, clip_norm: float | None) -> None:
        self._state = state
        self._clip_norm = clip_norm

    def clip(self) -> float:
        gradients = [p.grad for p in self._state.trained.values() if p.grad is not None]
        norm = norm_of(block_norms(gradients))
        factor = clip_factor(norm, self._clip_norm)
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        return norm

    def apply(self, learning_rate_scale: float) -> None:
        self._state.set_learning_rate_scale(learning_rate_scale)
        self._state.optimizer.step()
