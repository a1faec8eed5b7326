"""Whether a model that is cut as its recipe says computes what the whole one does: tried with one batch, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from training.arithmetic.buffers import Buffers
from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.objective import Objective, recipe_errors, seed_streams
from training.arithmetic.streams import streams_now
from training.errors import UserError
from training.parallel.tensor import CutModel
from training.recipe import Recipe

SAME = 1e-3
"""Of its own norm a gradient may differ; float32 rounds to 6e-8, and what is computed otherwise differs by its size."""
NOTHING = 1e-6
"""Of the norm of all: what is nothing else than rounding (a key's bias in an attention) may be anything so small."""


class Trial:
    """Made of a whole model, which is then cut."""

    def __init__(self, recipe: Recipe, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Raises `UserError` for a model that ranks cannot compute together."""
        self._recipe = recipe
        self._model = model
        self._batch = batch
        self._device = next(model.parameters()).device
        self._buffers = Buffers(model)
        before = self._buffers.copy()
        seed_streams(0, self._device)
        seeded = streams_now(self._device)
        self._loss, self._gradients = self._computed()
        if not torch.equal(seeded, streams_now(self._device)):
            raise UserError(
                f"{self._name}.loss() draws random numbers (dropout): ranks would draw the same ones for different"
                " parts of a tensor; leave them out, or set parallel.tensor = 1"
            )
        if not all(torch.equal(now, then) for now, then in zip(self._buffers.copy(), before, strict=True)):
            self._buffers.put_back(before)
            raise UserError(
                f"{self._name}'s model changes buffers (BatchNorm): ranks would do so by different parts of a tensor;"
                " use a norm without, or set parallel.tensor = 1"
            )

    @property
    def _name(self) -> str:
        return type(self._recipe).__name__

    def _computed(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the gradients, as autograd leaves them."""
        with recipe_errors("loss()"), _in_float32(self._device):
            loss = Objective(self._recipe, self._model, precision="float32")(self._batch)
            loss.backward()
        trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}
        return loss.detach(), found

    def forget(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None

    def require_same(self, cut: CutModel) -> None:
        """Raises `UserError` on all ranks, naming what is not the same but for rounding. Collective."""
        self.forget()
        loss, _ = self._computed()
        cut.sum_partly_summed()
        told = texts_of_all_ranks(json.dumps(self._maybe_complaint(loss, cut)))
        self.forget()
        for complaint in map(json.loads, told):
            if complaint is not None:
                raise UserError(complaint)

    def _maybe_complaint(self, loss: Tensor, cut: CutModel) -> str | None:
        if not torch.allclose(loss, self._loss, rtol=SAME, equal_nan=True):
            return (
                f"{self._name}'s model gives a loss of {loss.item()} if it is cut as cuts() says, and"
                f" {self._loss.item()} if it is whole: say there which numbers are a unit's; between blocks, sequences"
                " must be in the second dimension, and only what is between two matrices may look at several places of"
                " them"
            )
        total = torch.stack([gradient.norm() for gradient in self._gradients.values()]).norm()
        for name, parameter in self._model.named_parameters():
            if name not in self._gradients:
                continue
            whole = self._gradients[name]
            if parameter in cut.slices:
                whole = cut.slices[parameter].part(whole, cut.peers.index, cut.peers.number)
            gradient = torch.zeros_like(whole) if parameter.grad is None else parameter.grad
            if not (gradient - whole).norm() <= SAME * whole.norm() + NOTHING * total:
                return (
                    f"{self._name}'s {name} gets another gradient if the model is cut as cuts() says: what has weights"
                    " may not be between two of its matrices, nor tied to what is"
                )
        return None


def _in_float32(device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, enabled=False)
