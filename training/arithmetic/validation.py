"""Held-out scores during training: the same bits on any number of ranks.

Batches are fixed. Each is scored by one rank, and every rank adds up the batches' sums in the order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.arithmetic.buffers import judged
from training.arithmetic.objective import recipe_errors
from training.arithmetic.reduce import owned_range
from training.data.reader import Rows
from training.errors import UserError
from training.recipe import Recipe


class HeldOut(Protocol):
    """The samples of the test split, in the manifest's order."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Rows: ...


def validate(
    recipe: Recipe,
    model: nn.Module,
    held_out: HeldOut,
    *,
    batch_size: int,
    max_samples: int | None,
    rank: int,
    world_size: int,
    waiting: Callable[[], AbstractContextManager[None]],
) -> dict[str, float]:
    """The mean of each of the recipe's metrics over the held-out samples. Collective: other ranks are waited for inside
    of `waiting`.

    Raises `UserError` naming a metric that the recipe's `scores` lacks.
    """
    num_samples = min(len(held_out), max_samples or len(held_out))
    batches = [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]
    device = next(model.parameters()).device
    mine = torch.zeros(-(-len(batches) // world_size), len(recipe.metrics), dtype=torch.float64)
    with judged(model):
        for place, number in enumerate(owned_range(rank, world_size, len(batches))):
            fields = held_out.read(batches[number]).fields
            batch = {name: torch.from_numpy(array).to(device) for name, array in fields.items()}
            with recipe_errors("scores() on held-out samples"):
                mine[place] = _sums(recipe, recipe.scores(model, batch))
    total = torch.zeros(len(recipe.metrics), dtype=torch.float64)
    with waiting():
        rows = _in_order(mine, len(batches), world_size)
    for row in rows:
        total += row
    return dict(zip(recipe.metrics, (total / num_samples).tolist(), strict=True))


def _sums(recipe: Recipe, scores: Mapping[str, Tensor]) -> Tensor:
    missing = set(recipe.metrics) - set(scores)
    if missing:
        raise UserError(f"the recipe's scores() lacks {', '.join(sorted(missing))}, named in `metrics`")
    return torch.stack([scores[name].to(torch.float64).sum() for name in recipe.metrics])


def _in_order(mine: Tensor, num_batches: int, world_size: int) -> Tensor:
    """The sums of all batches, shape [batches, metrics], from those that each rank has."""
    if world_size == 1:
        return mine
    gathered = torch.empty(world_size * len(mine), mine.shape[1], dtype=mine.dtype)
    dist.all_gather_single(gathered, mine)
    parts = gathered.view(world_size, len(mine), mine.shape[1])
    return torch.cat([parts[rank, : len(owned_range(rank, world_size, num_batches))] for rank in range(world_size)])
