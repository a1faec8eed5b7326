"""One chunk of a model on its stage: several microbatches under way at once, and each computed as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from training.errors import UserError
from training.parallel.parts import Values


@dataclass(frozen=True, kw_only=True)
class _UnderWay:
    """What the backward pass of a microbatch needs."""

    outputs: tuple[Tensor, ...]
    buffers: list[Tensor]
    gradients: dict[int, Tensor]
    """Of those inputs that want one."""
    num_gradients: int


class Chunk:
    """Forward and back, whichever microbatches come between."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._under_way: dict[int, _UnderWay] = {}
        self._slots = [
            (owner, key, tensor)
            for owner in module.modules()
            for key, tensor in owner._buffers.items()
            if tensor is not None
        ]
        """Where buffers hang, and those that a step begins with."""

    def forward(self, microbatch: int, inputs: Sequence[Tensor], compute: Callable[[], Values]) -> tuple[Tensor, ...]:
        """What `compute` gives of the inputs, with buffers of its own: backward passes want those that they saw."""
        gradients: dict[int, Tensor] = {}
        wanting = [tensor for tensor in inputs if tensor.requires_grad]
        for number, tensor in enumerate(wanting):
            tensor.register_hook(partial(gradients.__setitem__, number))  # type: ignore[no-untyped-call]  # no annotation
        copies = {tensor: tensor.clone() for _, _, tensor in self._slots}
        self._hang([copies[tensor] for _, _, tensor in self._slots])
        outputs = as_tuple(compute())
        self._under_way[microbatch] = _UnderWay(
            outputs=outputs, buffers=self._hanging(), gradients=gradients, num_gradients=len(wanting)
        )
        return outputs

    def hang_buffers_of(self, microbatch: int) -> None:
        """As its forward pass left them."""
        self._hang(self._under_way[microbatch].buffers)

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """From the gradients of its outputs to those of its inputs, of whichever want them."""
        self.hang_buffers_of(microbatch)
        one = self._under_way.pop(microbatch)
        wanting = [output for output in one.outputs if output.requires_grad]
        if wanting:
            torch.autograd.backward(wanting, list(gradients))
        if len(one.gradients) < one.num_gradients:
            raise UserError(
                "a part of the recipe's model does not use what the part before gave: in a pipeline the loss must hang"
                " on all of it"
            )
        return [one.gradients[number] for number in range(one.num_gradients)]

    def forget(self, microbatch: int) -> None:
        """It has failed, and does not go back."""
        self._under_way.pop(microbatch, None)

    def _hanging(self) -> list[Tensor]:
        found = [owner._buffers[key] for owner, key, _ in self._slots]
        return [tensor for tensor in found if tensor is not None]

    def _hang(self, tensors: Sequence[Tensor]) -> None:
        for (owner, key, _), tensor in zip(self._slots, tensors, strict=True):
            owner._buffers[key] = tensor


def as_tuple(values: Values) -> tuple[Tensor, ...]:
    """Raises `UserError` unless they can be sent."""
    found = values if isinstance(values, tuple) else (values,)
    if not all(isinstance(one, Tensor) for one in found) or (isinstance(values, tuple) and len(found) < 2):
        raise UserError(
            f"a part of the recipe's model gives {type(values).__name__} of {[type(one).__name__ for one in found]}: in"
            " a pipeline it gives a tensor, or a tuple of two or more"
        )
    if len({one for one in found if one.requires_grad}) < sum(one.requires_grad for one in found):
        raise UserError(
            "a part of the recipe's model gives the same tensor twice, whose gradient a pipeline would add up in"
            " another order: give it once"
        )
    return found


def as_values(tensors: Sequence[Tensor]) -> Values:
    """The inverse."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
