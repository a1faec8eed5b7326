"""A batch to try: what a model that is whole makes of it, so that one in parts can be held against that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.arithmetic.buffers import Buffers
from training.arithmetic.objective import Objective, recipe_errors, seed_streams
from training.arithmetic.streams import streams_now
from training.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Made:
    """Of a batch."""

    loss: Tensor
    buffers: list[Tensor]
    gradients: dict[str, Tensor]


class Trial:
    """Of one batch, there and back. The model is as it was between two of them."""

    def __init__(self, recipe: Recipe, model: nn.Module, batch: Mapping[str, Tensor], *, precision: str) -> None:
        self.recipe = recipe
        self.model = model
        self.batch = batch
        self.precision = precision
        self.device = next(model.parameters()).device
        self.name = type(recipe).__name__
        self.buffers = Buffers(model)
        self.buffers_before = self.buffers.copy()

    def computed(self, where: str) -> tuple[Made, list[Tensor]]:
        """By the model as it is now; and where the random streams stood at first, after the loss, and at last."""
        seed_streams(0, self.device)
        streams = [streams_now(self.device)]
        with recipe_errors(where):
            loss = Objective(self.recipe, self.model, precision=self.precision)(self.batch)
            buffers = self.buffers.current()
            streams.append(streams_now(self.device))
            loss.backward()
        streams.append(streams_now(self.device))
        return Made(loss=loss.detach(), buffers=buffers, gradients=self.gradients()), streams

    def gradients(self) -> dict[str, Tensor]:
        """As they stand, by name."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in trained.items()}

    def restore(self) -> None:
        self.buffers.put_back(self.buffers_before)
        for parameter in self.model.parameters():
            parameter.grad = None
