"""A part of a parameter on a peer's server, whose framework leaves adding up and the optimizer to its user."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.servers.pushes import Case, Gradient, optimizer_of


class Shard:
    """May be used by several threads."""

    def __init__(self, case: Case, part: range) -> None:
        self._is_sparse = case.is_sparse
        self._lock = threading.Lock()
        self._parameter = case.parameter(part)
        self._optimizer = optimizer_of(self._parameter)
        self.changed: Sequence[Tensor] = ()
        """By the last step: the parameter, or which rows and their values."""

    def add(self, gradient: Tensor) -> None:
        """Sparse if it is of rows. It may be kept, and changed."""
        with self._lock:
            if self._parameter.grad is None:
                self._parameter.grad = gradient
            else:
                self._parameter.grad += gradient

    @torch.no_grad()
    def step(self) -> None:
        """Once all gradients are there."""
        if self._is_sparse:
            assert self._parameter.grad is not None
            self._parameter.grad = self._parameter.grad.coalesce()
            numbers = self._parameter.grad.indices()[0]
            self._optimizer.step()
            self.changed = (numbers, self._parameter[numbers])
        else:
            self._optimizer.step()
            self.changed = (self._parameter.detach(),)
        self._parameter.grad = None


def parts_of(gradient: Gradient, case: Case, parts: Sequence[range]) -> list[Tensor]:
    """What each server gets: a tensor, sparse if it is of rows."""
    cut = [gradient.within(part) for part in parts]
    if not case.is_sparse:
        return [one.values for one in cut]
    return [one.as_sparse(len(part)) for one, part in zip(cut, parts, strict=True)]
