"""The one object that holds all that a step changes. Whatever is not here is a pure function of the step number.

The learning rate, the random streams (keyed by seed, step and virtual worker) and the position in the data are such
functions, and so need not be saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.errors import DamagedError, UserError
from training.objective import seed_streams
from training.recipe import Recipe


class TrainState:
    """Model, optimizer and the number of finished steps."""

    def __init__(self, recipe: Recipe, *, seed: int, device: torch.device) -> None:
        seed_streams(seed, device)
        self.model: nn.Module = recipe.model().to(device)
        self.optimizer: Optimizer = recipe.optimizer(self.model)
        self.step = 0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `model.NAME` (parameters and buffers) and `optimizer.KEY.NAME`. Not copies."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{key}.{name}"] = value
        return {name: found[name].detach() for name in sorted(found)}

    def load(self, tensors: Mapping[str, Tensor], *, step: int) -> None:
        """Become the state that `tensors()` was taken from. Raises `DamagedError` if the names or shapes differ."""
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        moments = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
        self._require_fit(weights, moments)
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        for full_name, tensor in moments.items():
            _, key, name = full_name.split(".", 2)
            parameter = parameters[name]
            device = torch.device("cpu") if key == "step" else parameter.device
            self.optimizer.state[parameter][key] = tensor.to(device, copy=True)
        self.step = step

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin with these weights (`model.NAME`). Raises `UserError` if they do not fit the model."""
        weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        own = self.model.state_dict()
        for name in sorted({*own, *weights}):
            mine, theirs = (found[name].shape if name in found else None for found in (own, weights))
            if mine != theirs:
                raise UserError(f"train.warm_start: {name} has shape {_shown(theirs)} there, and {_shown(mine)} here")
        self.model.load_state_dict(weights)

    def _require_fit(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Every weight, and for every parameter the same entries of the optimizer: each a scalar or of its shape."""
        shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        if {name: tensor.shape for name, tensor in weights.items()} != shapes:
            raise DamagedError("the checkpoint does not fit this recipe's model: other names or shapes")
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        keys = {name.split(".", 2)[1] for name in moments}
        if set(moments) != {f"optimizer.{key}.{name}" for key in keys for name in trained}:
            raise DamagedError("the checkpoint does not hold the same optimizer entries for every parameter")
        for full_name, tensor in moments.items():
            if tensor.dim() and tensor.shape != shapes[full_name.split(".", 2)[2]]:
                raise DamagedError(f"the checkpoint's {full_name} has another shape than its parameter")

    def set_learning_rate_scale(self, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * scale

    def weights_sha256(self) -> str:
        return tensors_sha256({k: v for k, v in self.tensors().items() if k.startswith("model.")})

    def state_sha256(self) -> str:
        return tensors_sha256(self.tensors())


def _shown(maybe_shape: torch.Size | None) -> str:
    return "none (it is missing)" if maybe_shape is None else str(list(maybe_shape))


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Over each tensor's name, dtype, shape and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
