"""Whether a model that is cut as its recipe says computes what the whole one does: tried with one batch, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.arithmetic.collectives import texts_of_all_ranks
from training.errors import UserError
from training.parallel.tensor import CutModel
from training.parallel.trial import Trial
from training.recipe import Recipe

SAME = 1e-3
"""Of its own norm a gradient may differ; float32 rounds to 6e-8, and what is computed otherwise differs by its size."""
NOTHING = 1e-6
"""Of the norm of all: what is nothing else than rounding (a key's bias in an attention) may be anything so small."""

WHERE = "loss() of held-out samples, with which parallel.tensor is tried"


class TensorTrial(Trial):
    """Made of a whole model, which is then cut."""

    def __init__(self, recipe: Recipe, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Raises `UserError` for a model that ranks cannot compute together."""
        super().__init__(recipe, model, batch, precision="float32")
        try:
            self._whole, (first, *_, last) = self.computed(WHERE)
        finally:
            self.restore()
        if not torch.equal(first, last):
            raise UserError(
                f"{self.name}.loss() draws random numbers (dropout): ranks would draw the same ones for different"
                " parts of a tensor; leave them out, or set parallel.tensor = 1"
            )
        if not all(map(torch.equal, self._whole.buffers, self.buffers_before)):
            raise UserError(
                f"{self.name}'s model changes buffers (BatchNorm): ranks would do so by different parts of a tensor;"
                " use a norm without, or set parallel.tensor = 1"
            )

    def require_same(self, cut: CutModel) -> None:
        """Raises `UserError` on all ranks, naming what is not the same but for rounding. Collective."""
        try:
            made, _ = self.computed(WHERE)
            cut.sum_partly_summed()
            told = texts_of_all_ranks(json.dumps(self._maybe_complaint(made.loss, cut)))
        finally:
            self.restore()
        for complaint in map(json.loads, told):
            if complaint is not None:
                raise UserError(complaint)

    def _maybe_complaint(self, loss: Tensor, cut: CutModel) -> str | None:
        if not torch.allclose(loss, self._whole.loss, rtol=SAME, equal_nan=True):
            return (
                f"{self.name}'s model gives a loss of {loss.item()} if it is cut as cuts() says, and"
                f" {self._whole.loss.item()} if it is whole: say there which numbers are a unit's; between blocks,"
                " sequences must be in the second dimension, and only what is between two matrices may look at several"
                " places of them"
            )
        total = torch.stack([gradient.norm() for gradient in self._whole.gradients.values()]).norm()
        for name, parameter in self.model.named_parameters():
            if name not in self._whole.gradients:
                continue
            whole = self._whole.gradients[name]
            if parameter in cut.slices:
                whole = cut.slices[parameter].part(whole, cut.peers.index, cut.peers.number)
            gradient = torch.zeros_like(whole) if parameter.grad is None else parameter.grad
            if not (gradient - whole).norm() <= SAME * whole.norm() + NOTHING * total:
                return (
                    f"{self.name}'s {name} gets another gradient if the model is cut as cuts() says: what has weights"
                    " may not be between two of its matrices, nor tied to what is"
                )
        return None
