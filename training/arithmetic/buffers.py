"""A model's buffers: what a step makes of them, whoever computes which virtual worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.errors import DeterministicError, UserError


@dataclass(frozen=True)
class _Slot:
    """Where a buffer hangs. The recipe may change the tensor in place, or put another one in its place."""

    name: str
    owner: nn.Module
    key: str
    tensor: Tensor

    @property
    def current(self) -> Tensor:
        """Raises `DeterministicError` if what hangs there now cannot be summed with the others."""
        found = self.owner._buffers.get(self.key)
        if found is None or (found.shape, found.dtype) != (self.tensor.shape, self.tensor.dtype):
            shown = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise DeterministicError(
                f"the recipe's model made {shown} of its buffer {self.name}, which was {self.tensor.dtype}"
                f" {list(self.tensor.shape)}: a buffer must keep its dtype and shape"
            )
        return found.detach()

    def put_back(self, value: Tensor) -> None:
        self.tensor.copy_(value)
        self.owner._buffers[self.key] = self.tensor


class Buffers:
    """All buffers of a model. Float ones become their value at the step's start plus the mean of what the virtual
    workers changed, so that what nobody changed keeps its bits; others become what the last one made of them."""

    def __init__(self, model: nn.Module) -> None:
        """Raises `UserError` for a complex buffer."""
        self._model = model
        self._slots = [
            _Slot(f"{prefix}{'.' * bool(prefix)}{key}", module, key, tensor)
            for prefix, module in model.named_modules()
            for key, tensor in module._buffers.items()
            if tensor is not None
        ]
        self._names = {slot.name for slot in self._slots}
        self._are_float = [slot.tensor.is_floating_point() for slot in self._slots]
        for slot in self._slots:
            if slot.tensor.is_complex():
                raise UserError(f"the recipe's model has a complex buffer, {slot.name}: store its parts as floats")

    @property
    def num_float_elements(self) -> int:
        return sum(slot.tensor.numel() for slot in self._float_slots())

    def _float_slots(self) -> list[_Slot]:
        return [slot for slot, is_float in zip(self._slots, self._are_float, strict=True) if is_float]

    def copy(self) -> list[Tensor]:
        """Their values now. Raises `DeterministicError` if the model has got another one since it was made."""
        new = {name for name, _ in self._model.named_buffers(remove_duplicate=False)} - self._names
        if new:
            raise DeterministicError(
                f"the recipe's model got a buffer while it was used, {min(new)}: register it when the model is made"
            )
        return [slot.tensor.clone() for slot in self._slots]

    def current(self) -> list[Tensor]:
        """Of whatever tensors hang there now. Raises `DeterministicError` as `copy`, and if one is of another form."""
        return [slot.current.clone() for slot in self._slots]

    def by_name(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {slot.name: value for slot, value in zip(self._slots, values, strict=True)}

    def put_back(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for slot, value in zip(self._slots, values, strict=True):
                slot.put_back(value)

    def counters(self) -> NDArray[np.uint8]:
        """The bytes of those that are no floats, end to end."""
        found = [slot.current.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for slot in self._counters()]
        return np.concatenate([np.empty(0, np.uint8), *found])

    def set_counters(self, data: NDArray[np.uint8]) -> None:
        """The inverse."""
        start = 0
        for slot in self._counters():
            part = torch.from_numpy(data[start : start + slot.tensor.nbytes].copy())
            start += slot.tensor.nbytes
            slot.put_back(part.view(slot.tensor.dtype).view(slot.tensor.shape))

    def _counters(self) -> list[_Slot]:
        return [slot for slot, is_float in zip(self._slots, self._are_float, strict=True) if not is_float]

    def changes(self, before: Sequence[Tensor]) -> list[Tensor]:
        """What was added to each float buffer, flat, in float32. Exactly 0 where nothing changed, infinities too."""
        return [
            torch.where(slot.current == value, 0, slot.current - value).flatten().to(torch.float32)
            for slot, value, is_float in zip(self._slots, before, self._are_float, strict=True)
            if is_float
        ]

    def add_mean(self, before: Sequence[Tensor], mean: Tensor) -> None:
        """Become what the step makes of them: `mean` holds the mean changes, laid end to end."""
        offset = 0
        for slot, value, is_float in zip(self._slots, before, self._are_float, strict=True):
            if is_float:
                change = mean[offset : offset + value.numel()].view_as(value)
                slot.put_back(torch.where(change == 0, value, value + change))
                offset += value.numel()
            else:
                slot.put_back(slot.current)


@contextmanager
def judged(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module's mode and every buffer is what it was."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = Buffers(model)
    before = buffers.copy()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        buffers.put_back(before)
