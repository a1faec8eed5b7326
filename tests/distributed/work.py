"""What the ranks of the distributed tests do. Imported by spawned processes: no fixtures, no assertions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.unit.odd_recipes import Odd
from tests.unit.shares import all_shares
from tests.unit.tiny import MemoryReader, Tiny, make_trainer, tiny_preset, tiny_reader
from training.arithmetic.balance import Shares, even_shares, ranges
from training.arithmetic.exact import ExactReducer
from training.checkpoints.state import tensors_sha256
from training.config import EvaluateConfig, LaunchConfig, Preset
from training.loop import Trainer
from training.preset_file import load_preset
from training.recipe import Recipe
from training.recipes.digits import Digits
from training.recipes.stdlib import ByteTransformer
from training.servers.colocated import Colocated

SLOW_SECONDS = 0.03
ANYHOW = ByteTransformer(sequence_bytes=8, width=132, num_layers=4, num_heads=4)
"""Fits all layouts of up to eight ranks. Some of its matrices have more elements than a block of a norm."""


class Gives(nn.Module):
    """A model whose gradient is its input."""

    def __init__(self, num_elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_elements))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return (self.weight * batch["gradient"]).sum()


def wild_leaf(seed: int, leaf: int, num_elements: int) -> Tensor:
    """float32 elements that differ by many orders of magnitude and cancel."""
    generator = torch.Generator().manual_seed(seed * 1000 + leaf)
    exponents = torch.randint(-30, 31, (num_elements,), generator=generator).to(torch.float32)
    return torch.randn(num_elements, generator=generator) * torch.pow(2.0, exponents)


def sum_digests(rank: int, world_size: int, sizes: list[tuple[int, int]], bucket_bytes: int) -> list[str]:
    """A digest of the mean gradient and the sum of extras for each (virtual workers, elements)."""
    return [
        _sum_digest(rank, even_shares(virtual_workers, world_size), seed, num_elements, bucket_bytes)
        for seed, (virtual_workers, num_elements) in enumerate(sizes)
    ]


def sum_digests_of_shares(
    rank: int, world_size: int, virtual_workers: int, num_elements: int, bucket_bytes: int
) -> list[str]:
    """The same of one size, for all ways to share the virtual workers out."""
    return [
        _sum_digest(rank, shares, virtual_workers, num_elements, bucket_bytes)
        for shares in all_shares(virtual_workers, world_size)
    ]


def _sum_digest(rank: int, shares: Shares, seed: int, num_elements: int, bucket_bytes: int) -> str:
    model = nn.ModuleList([Gives(num_elements), Gives(3)])
    reducer = ExactReducer(_Both(model), num_extras=2, ranges=ranges(shares), rank=rank, bucket_bytes=bucket_bytes)
    for worker in reducer.owned:
        leaf = wild_leaf(seed, worker, num_elements + 5)
        loss = reducer.forward(worker, {"gradient": leaf[:-5], "other": leaf[-5:-2]})
        reducer.backward(worker, loss, leaf[-2:].clone())
    extras = reducer.finish().clone()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 2
    digest = tensors_sha256({"extras": extras, **gradients})
    reducer.close()
    return digest


class _Both(nn.Module):
    """The second is not reached where its input is positive: so that gradients are missing in some virtual workers."""

    def __init__(self, models: nn.ModuleList) -> None:
        super().__init__()
        self.models = models

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.models[0](batch)
        if batch["other"][0] > 0:
            return loss
        return loss + self.models[1]({"gradient": batch["other"]})


def digits_reader() -> MemoryReader:
    """Pictures made by arithmetic: what they show does not matter here."""
    numbers = np.arange(200 * 64, dtype=np.int64)
    pixels = (numbers * numbers * 7919 % 10007 % 17).astype(np.uint8).reshape(200, 8, 8)
    return MemoryReader({"pixels": pixels, "label": np.arange(200, dtype=np.int64) * 7 % 10})


def text_reader() -> MemoryReader:
    """Texts made by arithmetic."""
    numbers = np.arange(100 * 129, dtype=np.int64)
    return MemoryReader({"bytes": (numbers * numbers * 7919 % 10007 % 251).astype(np.uint8).reshape(100, 129)})


def trainer_of(
    recipe_name: str,
    rank: int,
    world_size: int,
    train: Mapping[str, Any],
    *,
    launch: LaunchConfig | None = None,
    servers: Colocated | None = None,
) -> Trainer:
    """A trainer of one of the workloads, its `[train]` section changed."""
    preset: Preset
    recipe: Recipe
    if recipe_name == "digits":
        preset, recipe, reader = load_preset("digits"), Digits(), digits_reader()
    elif recipe_name == "stdlib":
        preset, recipe, reader = load_preset("stdlib"), ByteTransformer(width=32, num_layers=1), text_reader()
    else:
        preset, reader = tiny_preset(), tiny_reader()
        recipe = Tiny() if recipe_name == "tiny" else Odd(model_kind=recipe_name)
    preset = replace(preset, launch=launch or LaunchConfig(nodes=1), train=replace(preset.train, **train))
    return make_trainer(preset=preset, recipe=recipe, reader=reader, rank=rank, world_size=world_size, servers=servers)


def train_digests(
    rank: int,
    world_size: int,
    recipe_name: str,
    num_steps: int,
    train: Mapping[str, Any],
    evaluate_batch_size: int = 256,
) -> dict[str, Any]:
    """Digests and losses after a few steps."""
    trainer = trainer_of(recipe_name, rank, world_size, train)
    trainer.preset = replace(trainer.preset, evaluate=EvaluateConfig(batch_size=evaluate_batch_size))
    outcomes = [trainer.train_step() for _ in range(num_steps)]
    return {
        "weights": trainer.state.weights_sha256(),
        "state": trainer.state.state_sha256(),
        "losses": [(outcome.loss, outcome.grad_norm) for outcome in outcomes],
        "ledger": [outcome.samples for outcome in outcomes],
        "validation": [dict(outcome.validation) for outcome in outcomes],
    }


@dataclass(frozen=True, kw_only=True)
class Slowed(Tiny):
    """Takes its time with each virtual worker."""

    seconds: list[float] = field(default_factory=lambda: [0.0], compare=False)
    """What is in here now."""
    pauses: list[float] = field(default_factory=list, compare=False)
    """All that were made."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(self.seconds[0])
        self.pauses.append(self.seconds[0])
        return super().loss(model, batch)


def train_with_slow_ranks(rank: int, world_size: int, slow_ranks: list[int], min_steps: int) -> dict[str, Any]:
    """One rank is slow until it has a single virtual worker, then another, and so on; and so many steps at least."""
    recipe = Slowed()
    preset = tiny_preset(steps=1 << 20, batch_size=32, virtual_workers=8, checkpoint_every_steps=1 << 20)
    preset = replace(preset, launch=LaunchConfig(nodes=1, balance_seconds=0.05))
    trainer = make_trainer(preset=preset, recipe=recipe, rank=rank, world_size=world_size)
    history: list[tuple[float, float, str]] = []
    shares: list[Shares] = []

    def step() -> None:
        outcome = trainer.train_step()
        history.append((outcome.loss, outcome.grad_norm, outcome.samples))
        trainer.after_step(outcome.control)

    for slow_rank in slow_ranks:
        recipe.seconds[0] = SLOW_SECONDS if rank == slow_rank else SLOW_SECONDS / 10
        step()  # at least: it may have but one, for having been slow by itself
        while trainer.balance.shares[slow_rank] > 1:
            step()
        shares.append(trainer.balance.shares)
    recipe.seconds[0] = 0.0
    while len(history) < min_steps:
        step()
    return {
        "state": trainer.state.state_sha256(),
        "history": history,
        "shares": shares,
        "num_slow": recipe.pauses.count(SLOW_SECONDS),
        "num_computed": len(recipe.pauses),
    }
