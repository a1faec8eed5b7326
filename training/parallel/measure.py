"""What a model's parts take, found out without computing: its loss on tensors that have shapes and no elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from training.arithmetic.objective import Objective, recipe_errors
from training.errors import UserError
from training.parallel.plan import ModelCost, Part
from training.parallel.tensor import CutModel
from training.parallel.tensor_peers import Peers
from training.recipe import Recipe, Sample

MAX_TENSOR = 8
"""Into more parts matrices are cut on no machine that there is."""


def measure(recipe: Recipe, sample: Sample, *, batch_size: int, precision: str) -> ModelCost:
    """Of one virtual worker's microbatch, `batch_size` samples like this one. A recipe whose loss hangs on values is
    computed after all."""
    arrays = {name: np.stack([array] * batch_size) for name, array in sample.items()}
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _measured(recipe, batch, precision)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return _measured(recipe, batch, precision)


def _measured(recipe: Recipe, batch: Mapping[str, Tensor], precision: str) -> ModelCost:
    """Whole, and cut into each number of parts that its matrices may be cut into."""
    parts = _measured_parts(recipe, batch, precision)
    with recipe_errors("cuts()"):
        num_units = math.gcd(*(cut.num_units for cut in recipe.cuts(recipe.model())))
    numbers = [number for number in range(2, MAX_TENSOR + 1) if num_units and num_units % number == 0]
    found = {number: _measured_cut(recipe, batch, precision, number) for number in numbers}
    return ModelCost(
        parts=parts,
        cut={number: cut for number, (cut, _) in found.items()},
        whole_sequences=frozenset(number for number, (_, in_sequences) in found.items() if not in_sequences),
    )


def _measured_cut(
    recipe: Recipe, batch: Mapping[str, Tensor], precision: str, number: int
) -> tuple[tuple[Part, ...], bool]:
    """With sequences in parts, if they can be; and whether they are."""
    try:
        return _measured_parts(recipe, batch, precision, Pretended(number), in_sequences=True), True
    except UserError:
        return _measured_parts(recipe, batch, precision, Pretended(number)), False


def _measured_parts(
    recipe: Recipe,
    batch: Mapping[str, Tensor],
    precision: str,
    maybe_peers: Pretended | None = None,
    *,
    in_sequences: bool = False,
) -> tuple[Part, ...]:
    with recipe_errors("model()"):
        model = recipe.model()
        blocks = recipe.blocks(model)
    if maybe_peers is not None:
        CutModel(recipe, model, maybe_peers, in_sequences=in_sequences)
    with recipe_errors("optimizer()"):
        optimizer_bytes = _optimizer_bytes(recipe, model)
    counter = _Counter(model, blocks)
    if maybe_peers is not None:
        maybe_peers.count = counter.count_exchanged
    with counter.counting(), _as_it_is():
        loss = Objective(recipe, model, precision=precision)(batch)
    if maybe_peers is not None:
        loss.backward()
    del loss
    parts = _parts_of_parameters(model, blocks)
    trained = [(p, part) for p, part in parts.items() if p.requires_grad]
    return tuple(
        Part(
            weight_bytes=sum(p.nbytes for p, at in parts.items() if at == part),
            optimizer_bytes=sum(optimizer_bytes.get(p, 0) for p, at in trained if at == part),
            saved_bytes=counter.saved_bytes[part],
            output_bytes=counter.output_bytes[part],
            exchanged_bytes=counter.exchanged_bytes[part],
        )
        for part in range(counter.num_parts)
    )


class Pretended(Peers):
    """Ranks that are not there: what they would be told is counted, and they say the same."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.index = 0
        self.count: Callable[[int], None] = lambda num_bytes: None

    def of_all(self, own: Tensor) -> Tensor:
        self.count(own.nbytes * (self.number - 1))
        return torch.stack([own] * self.number)

    def dealt(self, pieces: Tensor) -> Tensor:
        self.count(pieces.nbytes // self.number * (self.number - 1))
        return pieces.clone(memory_format=torch.contiguous_format)


@contextmanager
def _as_it_is() -> Iterator[None]:
    """The recipe's own error is one, and not that nothing can be known of values that are not there."""
    try:
        with recipe_errors("loss()"):
            yield
    except Exception as error:
        if isinstance(error.__cause__, DataDependentOutputException | DynamicOutputShapeException):
            raise error.__cause__ from None
        raise


class _Counter:
    """Bytes that autograd keeps, by the part of the model that is being computed."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.num_parts = len(blocks) + 2 if blocks else 1
        self.saved_bytes = [0] * self.num_parts
        self.output_bytes = [0] * self.num_parts
        self.exchanged_bytes = [0] * self.num_parts
        self._blocks = blocks
        self._part = 0
        own = [*model.parameters(), *model.buffers()]
        self._known = {tensor.untyped_storage()._cdata for tensor in own}
        self._kept: list[Tensor] = []
        """Or another storage might get the place of one that is gone."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        hooks = [block.register_forward_pre_hook(self._begin(n + 1)) for n, block in enumerate(self._blocks)]
        hooks += [block.register_forward_hook(self._end(n + 1)) for n, block in enumerate(self._blocks)]
        with saved_tensors_hooks(self._save, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()

    def _begin(self, part: int) -> Any:
        def begin(block: nn.Module, inputs: Any) -> None:
            self._part = part
            self.output_bytes[part - 1] = self.output_bytes[part - 1] or _num_bytes(inputs)

        return begin

    def _end(self, part: int) -> Any:
        def end(block: nn.Module, inputs: Any, outputs: Any) -> None:
            self.output_bytes[part] = _num_bytes(outputs)
            for leaf in tree_leaves(outputs):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda gradient: self._enter(part))  # type: ignore[no-untyped-call]  # no annotation
            if part == len(self._blocks):
                self._part = part + 1

        return end

    def _enter(self, part: int) -> None:
        """Also as it goes back."""
        self._part = part

    def count_exchanged(self, num_bytes: int) -> None:
        self.exchanged_bytes[self._part] += num_bytes

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._kept.append(tensor)
            self.saved_bytes[self._part] += storage.nbytes()
        return tensor


def _num_bytes(given: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _parts_of_parameters(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[nn.Parameter, int]:
    """What is in no block is before or after them, as the model's parameters follow one another."""
    of_blocks = {p: number + 1 for number, block in enumerate(blocks) for p in block.parameters()}
    found, outside = {}, 0
    for parameter in model.parameters():
        found[parameter] = of_blocks.get(parameter, outside)
        if parameter in of_blocks:
            outside = len(blocks) + 1
    return found


def _optimizer_bytes(recipe: Recipe, model: nn.Module) -> dict[Tensor, int]:
    """What it keeps of each parameter: from the beginning, or else after a step of two elements in its place."""
    optimizer = recipe.optimizer(model)
    if optimizer.state:
        return {whole: _num_kept(entries, like=whole) for whole, entries in optimizer.state.items()}
    found: dict[Tensor, int] = {}
    with unset_fake_temporarily():
        for group in optimizer.param_groups:
            wholes = group["params"]
            stand_ins = [nn.Parameter(torch.zeros(2)) for _ in wholes]
            for one in stand_ins:
                one.grad = torch.zeros(2)
            group["params"] = stand_ins
            optimizer.step()
            for whole, one in zip(wholes, stand_ins, strict=True):
                found[whole] = _num_kept(optimizer.state[one], like=one) * whole.numel() // 2
            group["params"] = []
    return found


def _num_kept(entries: Mapping[str, Any], *, like: Tensor) -> int:
    """Bytes of the tensors of that shape."""
    return sum(value.nbytes for value in entries.values() if isinstance(value, Tensor) and value.shape == like.shape)
