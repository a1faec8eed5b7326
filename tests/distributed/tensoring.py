"""Trainings with matrices that are cut, step by step. Imported by spawned processes: no fixtures."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.optim import LBFGS, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.distributed.work import ANYHOW
from tests.unit.tiny import MemoryReader, make_trainer, tiny_preset
from training.arithmetic.norm import block_norms, norm_of
from training.config import ParallelConfig
from training.errors import UserError
from training.layout import Layout, Schedule
from training.loop import Trainer
from training.parallel import replica_update, tensor
from training.parallel.tensor import ByRows, CutModel, as_autocast
from training.parallel.tensor_peers import Tell, same, tell
from training.recipe import Cut, Recipe
from training.recipes.stdlib import Block, ByteTransformer, Transformer
from training.replica_loop import ReplicaTrainer

SEQUENCE = 8
NUM_STEPS = 50
TRAIN = {"virtual_workers": 4, "batch_size": 8}


class Recomputing(Block):
    """Keeps its input alone, and computes the rest again as it goes back."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return found


@dataclass(frozen=True, kw_only=True)
class Recomputes(ByteTransformer):
    def model(self) -> nn.Module:
        model = super().model()
        for block in self.blocks(model):
            block.__class__ = Recomputing
        return model


class Dropped(Transformer):
    def forward(self, tokens: Tensor) -> Tensor:
        return F.dropout(super().forward(tokens), 0.1)


@dataclass(frozen=True, kw_only=True)
class Dropping(ByteTransformer):
    def model(self) -> nn.Module:
        return Dropped(sequence_bytes=SEQUENCE, width=self.width, num_layers=1, num_heads=self.num_heads)


@dataclass(frozen=True, kw_only=True)
class Counting(ByteTransformer):
    def model(self) -> nn.Module:
        model = super().model()
        model.register_buffer("calls", torch.zeros(()))
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        model.calls += 1  # type: ignore[operator, assignment]  # a buffer
        return super().loss(model, batch)


@dataclass(frozen=True, kw_only=True)
class Mistaken(ByteTransformer):
    """Takes queries, keys and values for one."""

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        return [replace(cut, num_repeats=1) for cut in super().cuts(model)]


class ScalingBlock(Block):
    """Has a weight between two matrices."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.scale = nn.Parameter(torch.ones(self.head_size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(2, (3, -1, self.head_size)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v * self.scale, is_causal=True)
        found: Tensor = x + self.out(attended.transpose(1, 2).flatten(2))
        return found


@dataclass(frozen=True, kw_only=True)
class Between(ByteTransformer):
    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, Transformer)
        model.blocks = nn.Sequential(*(ScalingBlock(self.width, self.num_heads) for _ in range(self.num_layers)))
        return model

    def cuts(self, model: nn.Module) -> Sequence[Cut]:
        return super().cuts(model)[::2]


@dataclass(frozen=True, kw_only=True)
class Searching(ByteTransformer):
    def optimizer(self, model: nn.Module) -> Optimizer:
        return LBFGS(model.parameters())


SMALL: dict[str, Any] = {"sequence_bytes": SEQUENCE, "width": 32, "num_layers": 2, "num_heads": 4}
RECIPES = {
    "transformer": ByteTransformer(**SMALL),
    "recomputes": Recomputes(**SMALL),
    "deep": ByteTransformer(**{**SMALL, "num_layers": 4}),
    "deep, recomputing": Recomputes(**{**SMALL, "num_layers": 4}),
    "dropout": Dropping(**SMALL),
    "buffers": Counting(**SMALL),
    "repeats": Mistaken(**SMALL),
    "between": Between(**SMALL),
    "pieces": ByteTransformer(**{**SMALL, "width": 48, "num_heads": 6}),
    "optimizer": Searching(**SMALL),
    "anyhow": ANYHOW,
}


def texts() -> MemoryReader:
    numbers = np.arange(100 * (SEQUENCE + 1), dtype=np.int64)
    return MemoryReader({"bytes": (numbers * numbers * 7919 % 10007 % 251).astype(np.uint8).reshape(100, -1)})


def trainer_in(
    recipe: str,
    rank: int,
    maybe_layout: Layout | None,
    in_sequences: bool,
    train: Mapping[str, Any],
    schedule: Schedule = "1f1b",
) -> Trainer:
    """In a layout; or on one rank, as always."""
    preset = tiny_preset(steps=1000)
    settings = {"digest_every_steps": 0, "clip_norm": 0.5, **train}
    preset = replace(preset, train=replace(preset.train, **settings))
    if maybe_layout:
        parallel = ParallelConfig(
            pipeline=maybe_layout.pipeline,
            schedule=schedule,
            tensor=maybe_layout.tensor,
            sequences="parts" if in_sequences else "whole",
        )
        preset = replace(preset, launch=replace(preset.launch, nodes=maybe_layout.num_ranks), parallel=parallel)
    return make_trainer(
        preset=preset,
        recipe=RECIPES[recipe],
        reader=texts(),
        rank=rank,
        world_size=maybe_layout.num_ranks if maybe_layout else 1,
        kind=ReplicaTrainer if maybe_layout else Trainer,
    )


def in_tensors(
    rank: int,
    world_size: int,
    recipe: str,
    maybe_layout: Layout | None,
    in_sequences: bool,
    train: Mapping[str, Any],
    num_steps: int,
    maybe_from: str | None = None,
    maybe_to: str | None = None,
    bug: str = "none",
    schedule: Schedule = "1f1b",
) -> dict[str, Any]:
    """So many steps, from a state in a file, to one in a file, if that is wanted."""
    trainer = trainer_in(recipe, rank, maybe_layout, in_sequences, train, schedule)
    if maybe_from:
        tensors = safetensors.torch.load_file(maybe_from)
        trainer.state.load(tensors, step=int(tensors.pop("step")))
    told: dict[str, Any] = {"num_of_model": _num_elements(trainer)}
    if isinstance(trainer, ReplicaTrainer):
        trainer.begin_group()
    told["num_kept"] = _num_elements(trainer)
    with Tells() as tells, BUGS[bug]():
        outcomes = [trainer.train_step() for _ in range(num_steps)]
    told["history"] = [(outcome.loss, outcome.grad_norm, outcome.samples) for outcome in outcomes]
    told["num_sent"] = tells.num_bytes
    batch = held_out(trainer)
    if maybe_layout is None or maybe_layout.pipeline == 1:
        told["num_saved_bytes"] = _num_saved_bytes(trainer.recipe, trainer.state.model, batch)
    told["num_of_optimizer"] = sum(kept["exp_avg"].numel() for kept in trainer.state.optimizer.state.values())
    if not isinstance(trainer, ReplicaTrainer):
        told["loss_alone"] = trainer.recipe.loss(trainer.state.model, batch).item()
        return {**told, **whole(trainer, maybe_to)}
    with trainer.whole_state():
        told |= whole(trainer, maybe_to if rank == 0 else None)
        told["loss_alone"] = trainer.recipe.loss(trainer.state.model, batch).item()
    assert _num_elements(trainer) == told["num_kept"]
    return told


def held_out(trainer: Trainer) -> Mapping[str, Tensor]:
    """As many samples as a virtual worker has."""
    train = trainer.preset.train
    fields = trainer.held_out.read(range(train.batch_size // train.virtual_workers)).fields
    return {name: torch.from_numpy(array) for name, array in fields.items()}


def _num_saved_bytes(recipe: Recipe, model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """What autograd keeps of its loss, beside what the model has. Collective."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        loss = recipe.loss(model, batch)
    del loss
    return sum(tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in known)


def refusal(rank: int, world_size: int, kind: str) -> str:
    """What is said of a recipe whose model cannot be cut; where its weights are between matrices, with whole sequences,
    as else they are summed."""
    trainer = trainer_in(kind, rank, Layout(tensor=world_size), kind != "between", TRAIN)
    assert isinstance(trainer, ReplicaTrainer)
    try:
        trainer.begin_group()
    except UserError as error:
        return str(error)
    return "nothing"


def _num_elements(trainer: Trainer) -> int:
    return sum(p.numel() for p in trainer.state.model.parameters())


def whole(trainer: Trainer, maybe_to: str | None) -> dict[str, Any]:
    if maybe_to:
        tensors = {name: tensor.contiguous().clone() for name, tensor in trainer.state.tensors().items()}
        tensors["step"] = torch.tensor(trainer.state.step)
        safetensors.torch.save_file(tensors, Path(f"{maybe_to}.new"))
        Path(f"{maybe_to}.new").rename(maybe_to)
    return {"state": trainer.state.state_sha256()}


def killed(rank: int, world_size: int, layout: Layout, num_steps: int, to: str) -> None:
    """So many steps into a file; and the last rank dies in the midst of the backward pass after the next two."""
    trainer = trainer_in("transformer", rank, layout, True, TRAIN)
    assert isinstance(trainer, ReplicaTrainer)
    trainer.begin_group()
    for _ in range(num_steps):
        trainer.train_step()
    with trainer.whole_state():
        whole(trainer, to if rank == 0 else None)
    for _ in range(2):
        trainer.train_step()
    if rank == world_size - 1:
        first = trainer.recipe.blocks(trainer.state.model)[0]
        first.register_full_backward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    trainer.train_step()


class Tells(ExitStack):
    """What this rank gives to others in collectives: each part, once for each other that gets it."""

    num_bytes = 0

    def __enter__(self) -> Tells:
        super().__enter__()
        for name in ("all_gather_single", "all_to_all_single", "all_reduce"):
            self.enter_context(mock.patch.object(dist, name, self._counting(getattr(dist, name))))
        return self

    def _counting(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counting(found: Tensor, *arguments: Any, group: Any = None, **others: Any) -> Any:
            number = dist.get_world_size(group)
            if collective.__name__ == "all_gather_single":
                self.num_bytes += arguments[0].nbytes * (number - 1)
            elif collective.__name__ == "all_to_all_single":
                self.num_bytes += arguments[0].nbytes * (number - 1) // number
            else:
                self.num_bytes += 2 * found.nbytes * (number - 1) // number
            return collective(found, *arguments, group=group, **others)

        return counting


BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "outputs of rows are not summed": lambda: mock.patch.object(ByRows, "forward", _of_own_units),
    "gradients of columns' inputs are not summed": lambda: mock.patch.object(tensor, "tell", _tell_forward_alone),
    "gradients of norms are not summed": lambda: mock.patch.object(CutModel, "sum_partly_summed"),
    "the norm is of own parts alone": lambda: mock.patch.object(replica_update, "clip_together", _clip_alone),
}
"""Each is a collective that is left out."""


def _of_own_units(self: ByRows, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias)


def _tell_forward_alone(x: Tensor, there: Tell, back: Tell) -> Tensor:
    return tell(x, there, same if there is same else back)


def _clip_alone(gradients: list[Tensor], block_places: Any, *, clip_norm: float, **_: Any) -> float:
    norm = norm_of(block_norms(gradients))
    if norm > clip_norm:
        torch._foreach_mul_(gradients, clip_norm / norm)
    return norm


class Disturbance:
    """Of sums of products, by as much as two ways of taking them may differ at most: each has an error of at most
    n·u·Σ|products| (Higham, Accuracy and Stability, 3.1), u being half of the last bit's weight."""

    def __init__(self, seed: int, *, precision: str) -> None:
        self._chance = torch.Generator().manual_seed(seed)
        self._of_result = 3 * 2.0**-8 if precision == "bfloat16" else 0.0
        """Where each rank's sum is rounded to bfloat16, their sum too, and one process's."""

    def of(self, total: Tensor, absolutes: Tensor, num_terms: int) -> Tensor:
        chance = 2 * torch.rand(total.shape, generator=self._chance) - 1
        most = (2 * num_terms * 2.0**-24 + self._of_result) * absolutes.float()
        return (total.float() + chance * most).to(total.dtype)


class _Product(torch.autograd.Function):
    """A linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, by: Disturbance) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by = by
        return by.of(F.linear(x, weight, bias), F.linear(x.abs(), weight.abs(), bias.abs()), x.shape[-1] + 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # any arguments
        x, weight = ctx.saved_tensors
        by, g, rows = ctx.by, gradient.flatten(0, -2), x.flatten(0, -2)
        return (
            by.of(gradient @ weight, gradient.abs() @ weight.abs(), len(weight)),
            by.of(g.t() @ rows, g.abs().t() @ rows.abs(), len(rows)),
            by.of(g.sum(0), g.abs().sum(0), len(g)),
            None,
        )


class _Scaled(torch.autograd.Function):
    """What a layer norm does last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, by: Disturbance) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by = by
        return x * weight + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # any arguments
        x, weight = ctx.saved_tensors
        by, g, terms = ctx.by, gradient.flatten(0, -2), (gradient * x).flatten(0, -2)
        return (
            gradient * weight,
            by.of(terms.sum(0), terms.abs().sum(0), len(g)),
            by.of(g.sum(0), g.abs().sum(0), len(g)),
            None,
        )


class Disturbed(nn.Module):
    """In the place of a layer, with its parameters."""

    def __init__(self, layer: nn.Linear | nn.LayerNorm, by: Disturbance) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._layer = [layer]
        self._by = by

    def forward(self, x: Tensor) -> Tensor:
        (layer,) = self._layer
        if isinstance(layer, nn.LayerNorm):
            normed = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            return as_tensor(_Scaled.apply(normed, self.weight, self.bias, self._by))
        x, weight, bias = (as_autocast(one) for one in (x, self.weight, self.bias))
        return as_tensor(_Product.apply(x, weight, bias, self._by))


def as_tensor(found: Any) -> Tensor:
    assert isinstance(found, Tensor)
    return found


def disturb(trainer: Trainer, seed: int) -> None:
    """Each of its sums that ranks with parts of matrices may take otherwise."""
    by = Disturbance(seed, precision=trainer.preset.train.precision)
    for block in trainer.recipe.blocks(trainer.state.model):
        for name, layer in list(block.named_children()):
            assert isinstance(layer, nn.Linear | nn.LayerNorm)
            setattr(block, name, Disturbed(layer, by))


def disturbed(
    rank: int, world_size: int, recipe: str, train: Mapping[str, Any], num_steps: int, seed: int
) -> list[Any]:
    """The history of one process in which these are disturbed."""
    trainer = trainer_in(recipe, rank, None, True, train)
    disturb(trainer, seed)
    outcomes = [trainer.train_step() for _ in range(num_steps)]
    return [(outcome.loss, outcome.grad_norm, outcome.samples) for outcome in outcomes]
