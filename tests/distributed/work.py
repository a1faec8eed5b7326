"""What the ranks of the distributed tests do. Imported by spawned processes: no fixtures, no assertions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tests.unit.tiny import MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from training.config import LaunchConfig, Preset, load_preset
from training.loop import Trainer
from training.recipe import Recipe
from training.recipes.digits import Digits
from training.reduce import OrderedReducer, owned_range
from training.state import tensors_sha256


class PlainReducer(OrderedReducer):
    """What DDP does: each rank adds its own gradients from left to right, and the backend adds those of the ranks."""

    def add(self, leaf: int, vector: Tensor) -> None:
        if leaf == self.owned.start:
            self._total = vector
        else:
            self._total += vector

    def ordered_sum(self) -> Tensor:
        total = self._total.clone()
        dist.all_reduce(total)
        return total


def wild_leaf(seed: int, leaf: int, num_elements: int) -> Tensor:
    """float32 elements that differ by many orders of magnitude and cancel."""
    generator = torch.Generator().manual_seed(seed * 1000 + leaf)
    exponents = torch.randint(-30, 31, (num_elements,), generator=generator).to(torch.float32)
    return torch.randn(num_elements, generator=generator) * torch.pow(2.0, exponents)


def sum_digests(rank: int, world_size: int, kind: type[OrderedReducer], sizes: list[tuple[int, int]]) -> list[str]:
    """A digest of the sum for each (virtual workers, elements)."""
    digests = []
    for seed, (virtual_workers, num_elements) in enumerate(sizes):
        reducer = kind(virtual_workers=virtual_workers, rank=rank, world_size=world_size)
        for leaf in owned_range(rank, world_size, virtual_workers):
            reducer.add(leaf, wild_leaf(seed, leaf, num_elements))
        digests.append(tensors_sha256({"sum": reducer.ordered_sum()}))
    return digests


def digits_reader() -> MemoryReader:
    """Pictures made by arithmetic: what they show does not matter here."""
    numbers = np.arange(200 * 64, dtype=np.int64)
    pixels = (numbers * numbers * 7919 % 10007 % 17).astype(np.uint8).reshape(200, 8, 8)
    return MemoryReader({"pixels": pixels, "label": np.arange(200, dtype=np.int64) * 7 % 10})


def trainer_of(recipe_name: str, rank: int, world_size: int) -> Trainer:
    preset: Preset
    recipe: Recipe
    if recipe_name == "digits":
        preset, recipe, reader = load_preset("digits"), Digits(), digits_reader()
        preset = replace(preset, launch=LaunchConfig(nodes=1))
    else:
        preset, recipe, reader = tiny_preset(), Tiny(), tiny_reader()
    return make_trainer(preset=preset, recipe=recipe, reader=reader, rank=rank, world_size=world_size)


def train_digests(
    rank: int, world_size: int, recipe_name: str, num_steps: int, kind: type[OrderedReducer]
) -> dict[str, Any]:
    """Digests and losses after a few steps."""
    trainer = trainer_of(recipe_name, rank, world_size)
    virtual_workers = trainer.preset.train.virtual_workers
    trainer.reducer = kind(virtual_workers=virtual_workers, rank=rank, world_size=world_size)
    outcomes = [trainer.train_step() for _ in range(num_steps)]
    return {
        "weights": trainer.state.weights_sha256(),
        "state": trainer.state.state_sha256(),
        "losses": [(outcome.loss, outcome.grad_norm) for outcome in outcomes],
        "ledger": [outcome.samples for outcome in outcomes],
    }
