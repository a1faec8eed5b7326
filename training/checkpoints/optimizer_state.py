"""An optimizer's state as named tensors: its entries for each parameter, and the settings that it changes itself.

Names: `optimizer.KEY.PARAMETER` and `setting.GROUP.KEY`; a Python number is a tensor without dimensions under
`optimizer_number.KEY.PARAMETER` and `setting_number.GROUP.KEY`, and becomes a number again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.errors import DamagedError, UserError

OURS = ("params", "lr", "peak_lr")
"""Entries of a group that are not its state: the schedule sets the learning rate anew in each step."""
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


def named_entries(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer keeps for each parameter. Raises `UserError` for what is neither tensor nor number."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            kind, tensor = _as_tensor(value)
            if tensor is None and value is not None:
                raise UserError(
                    f"the optimizer keeps {key!r} of {name} as a {type(value).__name__}: a checkpoint holds tensors and"
                    " numbers"
                )
            if tensor is not None:
                found[f"optimizer{kind}.{key}.{name}"] = tensor
    return found


def load_entries(
    optimizer: Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, may_keep: bool = False
) -> None:
    """The inverse. It `may_keep` tensors that are nobody else's. Raises `DamagedError` for an entry of a parameter that
    there is not."""
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        if not kind.startswith("optimizer"):
            continue
        key, _, name = rest.partition(".")
        if name not in parameters:
            raise DamagedError(f"the checkpoint holds {full_name}, and the recipe's model has no {name}")
        parameter = parameters[name]
        if kind == "optimizer_number":
            optimizer.state[parameter][key] = tensor.item()
        else:
            device = torch.device("cpu") if key == "step" else parameter.device
            optimizer.state[parameter][key] = tensor.to(device, copy=not may_keep)


def settings_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every setting that is a number or a tensor, copied."""
    return {name: tensor.clone() for name, tensor in _settings(optimizer)}


def changed_settings(optimizer: Optimizer, first: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are not what they were at first: some optimizers keep their state there."""
    return {
        name: tensor
        for name, tensor in _settings(optimizer)
        if name not in first or first[name].dtype != tensor.dtype or not torch.equal(first[name], tensor)
    }


def load_settings(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse."""
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        if kind.startswith("setting"):
            number, _, key = rest.partition(".")
            value = tensor.item() if kind == "setting_number" else tensor.clone()
            optimizer.param_groups[int(number)][key] = value


def _settings(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            kind, tensor = _as_tensor(value)
            if tensor is not None and key not in OURS:
                yield f"setting{kind}.{number}.{key}", tensor


def _as_tensor(value: Any) -> tuple[str, Tensor | None]:
    """Its kind, and itself as a tensor, if it is a tensor or a number."""
    if isinstance(value, Tensor):
        return "", value
    if type(value) in _NUMBERS:
        return "_number", torch.tensor(value, dtype=_NUMBERS[type(value)])
    return "", None
