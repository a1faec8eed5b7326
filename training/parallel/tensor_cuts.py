"""Which elements of a recipe's matrices each rank has. Pure arithmetic on a model that is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.arithmetic.objective import recipe_errors
from training.errors import UserError
from training.recipe import Cut, Recipe


@dataclass(frozen=True, kw_only=True)
class Slices:
    """A tensor as [num_before, num_units, the rest], of which each rank has as many units, one after another."""

    shape: tuple[int, ...]
    dimension: int
    """Of the shape, that becomes smaller."""
    num_before: int
    num_units: int

    def part(self, whole: Tensor, index: int, number: int) -> Tensor:
        """The units of rank `index` of so many, copied."""
        units = self.num_units // number
        found = whole.reshape(self.num_before, self.num_units, -1)[:, index * units : (index + 1) * units]
        return found.clone(memory_format=torch.contiguous_format).view(self.part_shape(number))

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse."""
        units = self.num_units // len(parts)
        return torch.cat([part.reshape(self.num_before, units, -1) for part in parts], 1).view(self.shape)

    def part_shape(self, number: int) -> tuple[int, ...]:
        """Of one of so many parts."""
        shape = list(self.shape)
        shape[self.dimension] //= number
        return tuple(shape)


def slices_of(cut: Cut) -> dict[Tensor, Slices]:
    """Of the parameters that are cut: a bias of the second matrix is not."""
    found: dict[Tensor, Slices] = {
        p: Slices(shape=tuple(p.shape), dimension=0, num_before=cut.num_repeats, num_units=cut.num_units)
        for p in (cut.columns.weight, cut.columns.bias)
        if p is not None
    }
    weight = cut.rows.weight
    of_rows = Slices(shape=tuple(weight.shape), dimension=1, num_before=len(weight), num_units=cut.num_units)
    return {**found, weight: of_rows}


def cuts_of(recipe: Recipe, model: nn.Module, number: int) -> list[Cut]:
    """Into so many parts. Raises `UserError` naming what the recipe lacks."""
    with recipe_errors("cuts()"):
        cuts = list(recipe.cuts(model))
    name = type(recipe).__name__
    if not cuts:
        raise UserError(
            f"parallel.tensor = {number} needs to know which matrices of {name}'s model may be cut: add cuts(model) to"
            " the recipe (docs/bring-your-own.md), or set parallel.tensor = 1"
        )
    names = {module: path for path, module in model.named_modules()}
    for place, cut in enumerate(cuts):
        _require_fit(cut, f"{name}.cuts()[{place}]", names)
        if cut.num_units % number:
            raise UserError(
                f"{name}.cuts()[{place}] ({names[cut.columns]}, {names[cut.rows]}) has num_units = {cut.num_units}"
                f" (attention heads, or numbers within a layer), which parallel.tensor = {number} does not divide:"
                " change either"
            )
    _require_once(model, cuts, name)
    return cuts


def _require_fit(cut: Cut, where: str, names: dict[nn.Module, str]) -> None:
    for field, matrix in (("columns", cut.columns), ("rows", cut.rows)):
        if type(matrix) is not nn.Linear or not names.get(matrix):
            raise UserError(f"{where}.{field} must be an nn.Linear within the model, and is {type(matrix).__name__}")
    if cut.num_units < 1 or cut.num_repeats < 1:
        raise UserError(f"{where}: num_units = {cut.num_units} and num_repeats = {cut.num_repeats} must be at least 1")
    if cut.columns.out_features % (cut.num_repeats * cut.num_units):
        raise UserError(
            f"{where}.columns ({names[cut.columns]}) gives {cut.columns.out_features} numbers, which are no"
            f" num_repeats × num_units = {cut.num_repeats} × {cut.num_units} units"
        )
    if cut.rows.in_features % cut.num_units:
        raise UserError(
            f"{where}.rows ({names[cut.rows]}) takes {cut.rows.in_features} numbers, which are no num_units ="
            f" {cut.num_units} units"
        )


def _require_once(model: nn.Module, cuts: Sequence[Cut], name: str) -> None:
    """Whoever else used a matrix would find a part of it."""
    places: dict[object, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(path)
    matrices = [matrix for cut in cuts for matrix in (cut.columns, cut.rows)]
    for matrix in matrices:
        for paths in (places[matrix], places[matrix.weight]):
            if len(paths) > 1 or matrices.count(matrix) > 1:
                raise UserError(f"{name}.cuts() cuts {paths[0]}, which is used twice ({paths}): no tied ones")
