"""How a recipe's model is cut into chunks: its `parts`, computed one after another, cut where its `blocks` begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.objective import recipe_errors
from training.arithmetic.reduce import owned_range
from training.arithmetic.streams import set_streams, streams_now
from training.errors import UserError
from training.recipe import Recipe

Values = Tensor | tuple[Tensor, ...]
"""What one part gives to the next."""


def chunks_of(recipe: Recipe, model: nn.Module, number: int) -> list[nn.Sequential]:
    """So many, with as many blocks each, as far as that goes (as `plan` reckons). Raises `UserError` saying what the
    recipe lacks."""
    with recipe_errors("parts()"):
        parts, blocks = list(recipe.parts(model)), list(recipe.blocks(model))
    name = type(recipe).__name__
    if not parts:
        raise UserError(
            f"a pipeline needs to know how {name}'s model is computed: add parts(model) to the recipe, which gives its"
            " modules one after another (docs/bring-your-own.md)"
        )
    if len(blocks) < number:
        raise UserError(
            f"{name}.blocks() gives {len(blocks)} blocks, and {number} chunks of a pipeline need one each: set"
            " parallel.pipeline to fewer, or give more blocks"
        )
    numbers = {part: place for place, part in enumerate(parts)}
    places = [numbers.get(block, -1) for block in blocks]
    if -1 in places or places != sorted(set(places)) or len(numbers) < len(parts):
        raise UserError(
            f"{name}.blocks() must be among {name}.parts(), in the same order, and each part there once:"
            " a pipeline cuts the parts where a block begins"
        )
    starts = [places[owned_range(chunk, number, len(blocks)).start] for chunk in range(1, number)]
    chunks = [nn.Sequential(*parts[start:stop]) for start, stop in pairwise([0, *starts, len(parts)])]
    _require_all_once(model, chunks, name)
    return chunks


def _require_all_once(model: nn.Module, chunks: Sequence[nn.Module], name: str) -> None:
    """Each tensor of the model lives on one stage."""
    owners: dict[Tensor, list[int]] = {}
    for number, chunk in enumerate(chunks):
        for tensor in [*chunk.parameters(), *chunk.buffers()]:
            owners.setdefault(tensor, []).append(number)
    for what, tensor in [*model.named_parameters(), *model.named_buffers()]:
        of = owners.get(tensor, [])
        if not of:
            raise UserError(f"{name}.parts() leaves {what} out: all of the model must be in them")
        if len(of) > 1:
            raise UserError(
                f"{what} is in chunks {of} of the pipeline, and would be trained on stages of its own by each: let the"
                f" parts of {name} have weights and buffers of their own (no tied ones)"
            )
    slots = {slot for chunk in chunks for slot in _slots(chunk)}
    for (module, key), what in _slots(model).items():
        if (module, key) not in slots:
            raise UserError(
                f"{name}.parts() hold buffer {what} elsewhere than the model does, which would not see what they make"
                " of it: let a part hold the module that has it"
            )


def _slots(module: nn.Module) -> dict[tuple[nn.Module, str], str]:
    """Where buffers hang, and what they are called."""
    return {
        (owner, key): f"{prefix}{'.' * bool(prefix)}{key}"
        for prefix, owner in module.named_modules()
        for key, tensor in owner._buffers.items()
        if tensor is not None
    }


class Rest(nn.Module):
    """In the place of the model, for the recipe's loss: its last chunk, from what the chunks before gave."""

    def __init__(self, recipe: Recipe, chunk: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.chunk = chunk
        self._recipe = recipe
        self._device = device

    def begin(self, values: Values, streams: Tensor, batch: Mapping[str, Tensor]) -> None:
        """A loss, with the random streams as they are seeded: where the model is called they become `streams`, in
        which the chunks before it have drawn."""
        self._maybe_values: Values | None = values
        self._streams = streams
        self._seeded = streams_now(self._device)
        self._batch = batch

    def forward(self, given: Any) -> Any:
        """Raises `UserError` if the loss does not take its model as a function of the inputs."""
        values, self._maybe_values = self._maybe_values, None
        if values is None:
            raise UserError(f"{self._name}.loss() calls its model twice: a pipeline computes it once")
        if not torch.equal(self._seeded, streams_now(self._device)):
            raise UserError(
                f"{self._name}.loss() draws random numbers before it calls its model: in a pipeline only the model, or"
                " what follows it, may"
            )
        inputs = self._recipe.inputs(self._batch)
        if not (isinstance(given, Tensor) and given.dtype == inputs.dtype and torch.equal(given, inputs)):
            raise UserError(
                f"{self._name}.loss() does not give its model inputs(batch) as they are: a pipeline's first stage has"
                " nothing else"
            )
        set_streams(self._streams, self._device)
        return self.chunk(values)

    @property
    def _name(self) -> str:
        return type(self._recipe).__name__
