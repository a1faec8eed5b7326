"""Where the random streams stand that a recipe may draw from: torch's, numpy's and Python's own, as bytes."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

_TWISTER = np.dtype(
    [("key", np.uint32, (624,)), ("position", np.int64), ("has_gauss", np.int64), ("gauss", np.float64)]
)
"""Numpy and Python have the same generator."""


def streams_now(device: torch.device) -> Tensor:
    """uint8, as many as ever on this device."""
    of_numpy = np.random.get_state(legacy=False)
    twister = of_numpy["state"]
    _, (*key, position), maybe_gauss = random.getstate()
    found = [
        torch.default_generator.get_state(),
        _bytes(twister["key"], twister["pos"], of_numpy["has_gauss"], of_numpy["gauss"]),
        _bytes(np.array(key, np.uint32), position, maybe_gauss is not None, maybe_gauss or 0.0),
    ]
    if device.type == "cuda":
        found.append(torch.cuda.get_rng_state(device))
    return torch.cat(found)


def set_streams(saved: Tensor, device: torch.device) -> None:
    """The inverse."""
    num_of_torch = torch.default_generator.get_state().numel()
    sizes = [num_of_torch, _TWISTER.itemsize, _TWISTER.itemsize]
    of_torch, of_numpy, of_python, of_device = torch.split(saved, [*sizes, saved.numel() - sum(sizes)])
    torch.default_generator.set_state(of_torch.clone())
    one = _twister(of_numpy)
    twister = {"key": one["key"], "pos": int(one["position"])}
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": twister,
            "has_gauss": int(one["has_gauss"]),
            "gauss": float(one["gauss"]),
        }
    )
    one = _twister(of_python)
    maybe_gauss = float(one["gauss"]) if one["has_gauss"] else None
    random.setstate((3, (*one["key"].tolist(), int(one["position"])), maybe_gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(of_device.clone(), device)


def _bytes(key: np.ndarray, position: int, has_gauss: bool, gauss: float) -> Tensor:
    return torch.from_numpy(np.array([(key, position, has_gauss, gauss)], _TWISTER).view(np.uint8).reshape(-1))


def _twister(saved: Tensor) -> np.void:
    one: np.void = saved.numpy().copy().view(_TWISTER)[0]
    return one
