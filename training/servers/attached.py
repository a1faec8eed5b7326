"""What a rank has of parameter servers, whatever the mode: its parts of the parameters, and its way to all of them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.objective import recipe_errors
from training.checkpoints.state import TrainState
from training.config import Preset
from training.errors import UserError
from training.recipe import Recipe
from training.servers.arithmetic import TensorState, require_elementwise
from training.servers.endpoints import PrimaryLost, Remote, Server
from training.servers.layout import Shard
from training.servers.mesh import Address, Mesh

MAX_COPIES = 16
"""Of the parameters in a message: they, and what the optimizer keeps of each. A push has at most 2·log2(V) sums."""
MAX_OTHER_BYTES = 1 << 28


class Attached:
    """Of a rank: training.servers.colocated and training.servers.stale_ranks have the two modes."""

    def __init__(self, recipe: Recipe, preset: Preset, *, address: str, secret: str) -> None:
        """`address` is this node's, for the other ranks; all prove that they know `secret`."""
        self._recipe = recipe
        self._preset = preset
        self._address = address
        self._secret = secret
        self._here: dict[str, Mesh] = {}
        self._maybe_remote: Remote | None = None
        self._maybe_parameters: Sequence[Tensor] | None = None
        self._shards: tuple[Shard, ...] = ()
        self._step = 0
        """In hand."""
        self._over_token = 0
        """Of the last group that was given up."""
        self._maybe_error: Exception | None = None
        """That ended a server here: this process cannot go on."""

    def _tensors(self, shard: int, state: TrainState) -> TensorState:
        """A shard as `state` has it, and its part of the optimizer."""
        with recipe_errors("optimizer()"):
            optimizer = self._recipe.optimizer(state.model)
        optimizer.state.update(state.optimizer.state)
        return TensorState(optimizer, list(state.trained.values()), self._shards[shard])

    def _mesh(self, what: str) -> Mesh:
        num_bytes = sum(parameter.nbytes for parameter in self._parameters)
        return Mesh(
            f"{what} {uuid.uuid4().hex}",
            secret=self._secret,
            address=self._address,
            here=self._here,
            max_bytes=(MAX_COPIES + 2 * self._preset.train.virtual_workers.bit_length()) * num_bytes + MAX_OTHER_BYTES,
        )

    def _introduce(self, served: Mapping[int, Server]) -> tuple[list[dict[str, Any]], dict[str, Address]]:
        """Tell all ranks where what is here listens: what each of them tells, and where all of it is. Collective."""
        own = {
            "worker": [self._worker.name, *self._worker.address],
            "servers": {shard: [one.mesh.name, *one.mesh.address] for shard, one in served.items()},
        }
        told = [json.loads(text) for text in texts_of_all_ranks(json.dumps(own))]
        places: dict[str, Address] = {}
        for name, host, port in (entry for one in told for entry in (one["worker"], *one["servers"].values())):
            places[name] = (host, port)
        return told, places

    @cached_property
    def _worker(self) -> Mesh:
        return self._mesh("worker")

    @property
    def _parameters(self) -> Sequence[Tensor]:
        assert self._maybe_parameters is not None, "a group has begun"
        return self._maybe_parameters

    @property
    def _remote(self) -> Remote:
        assert self._maybe_remote is not None, "a group has begun"
        return self._maybe_remote

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What ended a replica here is raised in the place of `PrimaryLost`, which it led to."""
        try:
            yield
        except PrimaryLost:
            if self._maybe_error is None:
                raise
            with recipe_errors(f"step {self._step}, on a server"):
                raise self._maybe_error from None

    def optimizer_entries(self) -> dict[Tensor, dict[str, Any]]:
        """What the shards keep of each parameter, as one optimizer would. Raises `PrimaryLost`."""
        parts: dict[Tensor, dict[str, list[Any]]] = {}
        with self._own_errors():
            snapshots = self._remote.pull_all()
        for shard, snapshot in zip(self._shards, snapshots, strict=True):
            for number, piece in enumerate(shard):
                entries = parts.setdefault(self._parameters[piece.parameter], {})
                for key, value in snapshot["optimizer"][number].items():
                    entries.setdefault(key, []).append(value)
        return {
            parameter: {key: _joined(values, parameter) for key, values in entries.items()}
            for parameter, entries in parts.items()
        }

    def give_up(self) -> None:
        """May be called by another thread: whoever waits for an answer of this group gets none."""
        maybe_remote = self._maybe_remote
        if maybe_remote is not None:
            self._give_up(maybe_remote)

    def _give_up(self, remote: Remote) -> None:
        """That one: there may be another by now, of a group that is well."""
        self._over_token = remote.token
        remote.give_up()

    def _hear_of_trouble(self, token: int, maybe_error: Exception | None) -> None:
        """From a replica here, of the group of that token."""
        self._maybe_error = self._maybe_error or maybe_error
        maybe_remote = self._maybe_remote
        if maybe_remote is not None and maybe_remote.token == token:
            self._give_up(maybe_remote)

    def require_group(self) -> None:
        """Raises `PrimaryLost` if it is known that this group is over: who computes hears of it so."""
        if self._over_token == self._remote.token:
            with self._own_errors():
                raise PrimaryLost("the group is over")


def _joined(values: Sequence[Any], parameter: Tensor) -> Any:
    """Of an entry of one parameter's pieces: vectors are cut, all else is the same in each."""
    first = values[0]
    if isinstance(first, Tensor) and first.dim() == 1 and sum(map(len, values)) == parameter.numel():
        return torch.cat(list(values)).view(parameter.shape)
    return first


def require_contiguous(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise UserError(
                f"{name} is not contiguous: parameter servers need elements in their order; clone it in model()"
            )


def require_divisible(optimizer: Optimizer) -> None:
    """Raises `UserError` if an optimizer of that kind does not treat each element by itself."""
    kind = type(optimizer)
    taken = signature(kind).parameters  # AdamW has more defaults than it takes
    settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
    try:
        require_elementwise(lambda module: kind(module.parameters(), **settings))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            "parameter servers and parallel.shard need an optimizer that treats each element by itself, and the"
            f" recipe's {kind.__name__} could not be tried for that ({error}): use train.strategy = 'all_reduce' and"
            " parallel.shard = 1"
        ) from error
