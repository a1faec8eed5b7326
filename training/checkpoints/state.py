"""The one object that holds all that a step changes. Whatever is not here is a pure function of the step number.

The learning rate, the random streams (keyed by seed, step and virtual worker) and the position in the data are such
functions, and so need not be saved.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.objective import recipe_errors, seed_streams
from training.checkpoints.optimizer_state import (
    changed_settings,
    load_entries,
    load_settings,
    named_entries,
    settings_of,
)
from training.checkpoints.snapshot import bytes_of
from training.documents import fast_digest
from training.errors import DamagedError, DeterministicError, UserError
from training.recipe import Recipe
from training.tensorfile import Layout, Place


class TrainState:
    """Model, optimizer and the number of finished steps."""

    def __init__(self, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        """Raises `DeterministicError` if the recipe gives neither."""
        seed_streams(seed, device)
        with recipe_errors("model()"):
            self.model: nn.Module = _require_module(recipe.model()).to(device)
        with recipe_errors("optimizer()"):
            self.optimizer: Optimizer = recipe.optimizer(self.model)
            self._first_settings = settings_of(self.optimizer)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        """The parameters that are trained, by name: the same ones in every step."""
        self.step = 0
        self._room: dict[str, Tensor] = {}
        """Memory for what the optimizer will keep, until something is put there."""

    def make_room(self, recipe: Recipe) -> None:
        """Have that memory before a state comes: it takes half as long to come by as the state takes to arrive.

        A step of a twin shows what the optimizer keeps. One that cannot make a step just so makes no room.
        """
        with suppress(Exception):  # whatever it lacks, training tells better
            twin = copy.deepcopy(self.model)
            for parameter in twin.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            optimizer = recipe.optimizer(twin)
            optimizer.step()
            self._room = named_entries(optimizer, dict(twin.named_parameters()))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, not copied: `model.NAME` (parameters and buffers), `buffer.NAME` (those that are not in
        the model's state dict), and the optimizer's (training.checkpoints.optimizer_state).

        Raises `UserError` naming what a checkpoint cannot hold.
        """
        found = {f"model.{name}": tensor for name, tensor in self._weights().items()}
        found |= {f"buffer.{name}": tensor for name, tensor in self._other_buffers().items()}
        found |= named_entries(self.optimizer, dict(self.model.named_parameters()))
        found |= changed_settings(self.optimizer, self._first_settings)
        return {name: found[name].detach() for name in sorted(found)}

    def places(self, layout: Layout) -> dict[str, Tensor]:
        """Where tensors like these may be put, to be loaded: their own places if they fit there, else new memory."""
        own, self._room = self._room | self.tensors(), {}
        return {
            name: own[name] if _fits(own.get(name), place) else torch.empty(place.shape, dtype=place.dtype)
            for name, place in layout.items()
        }

    def load(self, tensors: Mapping[str, Tensor], *, step: int, may_keep: bool = False) -> None:
        """Become the state that `tensors()` was taken from; it `may_keep` tensors that are nobody else's.

        Raises `DamagedError` if it does not fit the model."""
        weights = _below("model.", tensors)
        parameters = dict(self.model.named_parameters())
        own, buffers = self._weights(), self._other_buffers()
        kept = _below("buffer.", tensors)
        if _shapes(weights) != _shapes(own) or _shapes(kept) != _shapes(buffers):
            raise DamagedError("the checkpoint does not fit this recipe's model: other names or shapes")
        self.model.load_state_dict(_in_place(weights, self.model.state_dict(keep_vars=True)))
        for name, tensor in kept.items():
            buffers[name].copy_(tensor)
        load_entries(self.optimizer, parameters, tensors, may_keep=may_keep)
        load_settings(self.optimizer, tensors)
        self.step = step

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with these weights (`model.NAME`). Raises `UserError` if they do not fit the model."""
        weights = _below("model.", tensors)
        require_fit(self.model, _shapes(weights))
        self.model.load_state_dict(weights)

    def _weights(self) -> dict[str, Tensor]:
        found: dict[str, Any] = self.model.state_dict()
        other = [name for name, value in found.items() if not isinstance(value, Tensor)]
        if other:
            raise UserError(f"the recipe's model keeps {other[0]}, which is no tensor: a checkpoint cannot hold it")
        return found

    def _other_buffers(self) -> dict[str, Tensor]:
        """Those registered with `persistent=False`."""
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name not in saved}

    def unsummed_digests(self) -> dict[str, str]:
        """Of the buffers that are not averaged over virtual workers: they must be the same on all ranks."""
        found = {name: b.cpu().contiguous() for name, b in self.model.named_buffers() if not b.is_floating_point()}
        return {name: fast_digest(b.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, b in found.items()}

    def require_same_parameters(self) -> None:
        """Raises `DeterministicError` if the recipe trains other parameters than at first."""
        changed = self.trained.keys() ^ {name for name, p in self.model.named_parameters() if p.requires_grad}
        if changed:
            raise DeterministicError(
                f"step {self.step + 1}: {min(changed)} was frozen or unfrozen during training: decide in model()"
            )

    def set_learning_rate_scale(self, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * scale

    def weights_digest(self) -> str:
        """Of the weights' bytes in the order of their names: quick, to be compared step by step."""
        weights = self._weights()
        return fast_digest(*(bytes_of(weights[name].detach()) for name in sorted(weights)))

    def num_weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._weights().values())

    def weights_sha256(self) -> str:
        return tensors_sha256({k: v for k, v in self.tensors().items() if k.startswith("model.")})

    def state_sha256(self) -> str:
        return tensors_sha256(self.tensors())


def _require_module(made: object) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise DeterministicError(f"the recipe's model() gave {type(made).__name__}, not a torch.nn.Module")
    return made


def require_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, what: str = "train.warm_start") -> None:
    """Raises `UserError`, which says for what, naming a weight that a model of these shapes does not have alike."""
    own = _shapes(model.state_dict())
    for name in sorted({*own, *shapes}):
        if own.get(name) != shapes.get(name):
            theirs, mine = _shown(shapes.get(name)), _shown(own.get(name))
            raise UserError(f"{what}: {name} has shape {theirs} there, and {mine} here")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _fits(maybe_tensor: Tensor | None, place: Place) -> bool:
    """Whether bytes that are put there are its elements."""
    return (
        maybe_tensor is not None
        and (maybe_tensor.dtype, tuple(maybe_tensor.shape)) == (place.dtype, place.shape)
        and maybe_tensor.is_cpu
        and maybe_tensor.is_contiguous()
    )


def _in_place(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the very objects that hold them, where they are in their places already: those are not copied onto
    themselves."""
    return {name: own[name] if _is_at(own[name], tensor) else tensor for name, tensor in tensors.items()}


def _is_at(own: Tensor, tensor: Tensor) -> bool:
    return own.is_contiguous() and tensor.is_contiguous() and own.data_ptr() == tensor.data_ptr()


def _shown(maybe_shape: tuple[int, ...] | None) -> str:
    return "none (it is missing)" if maybe_shape is None else str(list(maybe_shape))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over each tensor's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
