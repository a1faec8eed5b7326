"""The optimizer's step on shards, and the whole state for whoever wants it (a checkpoint, a digest)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.norm import BLOCK_ELEMENTS, blocks
from training.checkpoints.optimizer_state import named_entries
from training.checkpoints.state import TrainState
from training.errors import UserError
from training.parallel.norms import clip_together
from training.parallel.sharded import Sharded, ShardedReducer, require_fit
from training.parallel.unit import Unit
from training.servers.arithmetic import sliced
from training.servers.attached import require_divisible
from training.servers.layout import Piece


def require_shardable(state: TrainState, device: torch.device) -> None:
    """Raises `UserError` naming what cannot be cut, before anything is."""
    if device.type != "cpu":
        raise UserError("parallel.shard was tried on processors alone so far: use parallel.shard = 1 on GPUs")
    require_fit(state.model)
    require_divisible(state.optimizer)


class ShardedUpdate:
    """Of one step: each rank updates its shards of weights, with what the optimizer keeps of these alone."""

    def __init__(
        self, state: TrainState, sharded: Sharded, reducer: ShardedReducer, *, clip_norm: float | None
    ) -> None:
        """Takes the optimizer's state over, which is whole, and frees the weights."""
        self._state = state
        self._sharded = sharded
        self._reducer = reducer
        self._clip_norm = clip_norm
        self._parameters = list(state.trained.values())
        self._numbers = {parameter: number for number, parameter in enumerate(self._parameters)}
        own = [piece for unit in sharded.units for piece in self._pieces_of(unit, unit.index)]
        self._places = own
        self._pieces = sliced(state.optimizer, self._parameters, tuple(own))
        views = [view for unit in sharded.units for view in unit.own_pieces(unit.own)]
        for piece, view in zip(self._pieces, views, strict=True):
            piece.data = view
        self._block_places = [torch.tensor(self._places_of_blocks(n)).long() for n in range(sharded.layout.shard)]
        sharded.free()

    def _pieces_of(self, unit: Unit, index: int) -> list[Piece]:
        """A rank's, by the numbers of all parameters."""
        numbers = [self._numbers[parameter] for parameter in unit.parameters]
        return [replace(piece, parameter=numbers[piece.parameter]) for piece in unit.shards[index]]

    def _places_of_blocks(self, index: int) -> list[int]:
        """Where the norms of a rank's blocks stand among those of all parameters."""
        firsts = [0]
        for parameter in self._parameters:
            firsts.append(firsts[-1] + len(blocks(parameter.numel())))
        pieces = [piece for unit in self._sharded.units for piece in self._pieces_of(unit, index)]
        return [
            firsts[piece.parameter] + number
            for piece in pieces
            for number in range(piece.start // BLOCK_ELEMENTS, -(-piece.stop // BLOCK_ELEMENTS))
        ]

    def _gradients(self) -> list[Tensor]:
        totals = self._reducer.gradients()
        return [piece for unit in self._sharded.units for piece in unit.own_pieces(totals[unit])]

    def clip(self) -> float:
        """Scale the gradients; returns the norm before. It is taken block by block, whoever has which. Collective."""
        return clip_together(
            self._gradients(),
            self._block_places,
            group=self._sharded.groups.gathering,
            clip_norm=self._clip_norm,
            waiting=self._sharded.waiting,
        )

    def apply(self) -> None:
        """The optimizer's step, at the learning rate that is set."""
        for piece, gradient in zip(self._pieces, self._gradients(), strict=True):
            piece.grad = gradient
        self._state.optimizer.step()

    def lent(self) -> AbstractContextManager[Any]:
        """Meanwhile the model has whole copies of all weights. Collective at its beginning."""
        return self._sharded.lent()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile the state has all weights, and what the optimizer keeps of them: copies. Collective."""
        with self._sharded.lent() as copies:
            with self._sharded.waiting():
                entries: dict[Tensor, Any] = {copies[p]: kept for p, kept in self._entries().items()}
            self._state.optimizer.state.update(entries)
            try:
                yield
            finally:
                for copy in entries:
                    del self._state.optimizer.state[copy]

    def part(self) -> dict[str, Tensor]:
        """What this rank has between two steps, not copied: `START|NAME` is of a flat tensor from there on, `|NAME`
        whole. The names are those of `TrainState.tensors`."""
        names = list(self._state.trained)
        found = {f"|{name}": tensor for name, tensor in self._state.tensors().items() if not tensor.is_meta}
        for place, piece in zip(self._places, self._pieces, strict=True):
            name = names[place.parameter]
            kept = named_entries(self._state.optimizer, {name: piece})
            for full_name, tensor in {f"model.{name}": piece.detach(), **kept}.items():
                start = place.start if tensor.shape == piece.shape else ""
                found[f"{start}|{full_name}"] = tensor
        return found

    def _entries(self) -> dict[nn.Parameter, dict[str, Any]]:
        """What the optimizer keeps of each parameter."""
        told = self._told_by_all()
        found: dict[nn.Parameter, dict[str, Any]] = {
            self._parameters[number]: {key: _value(one) for key, one in entries.items()}
            for number, entries in told.items()
        }
        offset = 0
        for unit in self._sharded.units:
            pieces = self._pieces[offset : offset + len(unit.own_shard)]
            offset += len(pieces)
            for key in sorted({key for p in unit.parameters for key, one in found.get(p, {}).items() if one is LIKE}):
                wholes = unit.gathered(self._joined(unit, pieces, key))
                for parameter, whole in zip(unit.parameters, wholes, strict=True):
                    if key in found.get(parameter, {}):
                        found[parameter][key] = whole
        return found

    def _joined(self, unit: Unit, pieces: Sequence[nn.Parameter], key: str) -> Tensor:
        """A vector like `own`."""
        vector = torch.zeros_like(unit.own)
        for place, piece in zip(unit.own_pieces(vector), pieces, strict=True):
            if key in self._state.optimizer.state.get(piece, {}):
                place.copy_(self._state.optimizer.state[piece][key])
        return vector

    def _told_by_all(self) -> dict[int, dict[str, Any]]:
        """Of each parameter that somebody has a piece of: the keys, and numbers. A rank may have no piece at all."""
        own: dict[int, dict[str, Any]] = {}
        numbers = [piece.parameter for unit in self._sharded.units for piece in self._pieces_of(unit, unit.index)]
        for number, piece in zip(numbers, self._pieces, strict=True):
            entries = self._state.optimizer.state.get(piece, {})
            own[number] = {key: _told(value, piece) for key, value in entries.items() if value is not None}
        texts = texts_of_all_ranks(json.dumps(own))
        return {int(number): entries for text in texts for number, entries in json.loads(text).items()}


def joined(parts: Sequence[Mapping[str, Tensor]], state: TrainState) -> dict[str, Tensor]:
    """Of all ranks' parts, tensors as `state.load` takes them."""
    found: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            start, _, full_name = name.partition("|")
            if not start:
                found[full_name] = tensor.clone()
                continue
            num_words = 1 if full_name.startswith("model.") else 2
            parameter = state.trained[full_name.split(".", num_words)[-1]]
            if full_name not in found:
                found[full_name] = torch.empty(parameter.shape, dtype=tensor.dtype)
            found[full_name].view(-1)[int(start) : int(start) + len(tensor)] = tensor
    names = {parameter: name for name, parameter in state.trained.items()}
    for name, parameter in state.model.named_parameters(remove_duplicate=False):
        if parameter in names:  # one that is tied has several, of which parts have the first
            found[f"model.{name}"] = found[f"model.{names[parameter]}"]
    return found


LIKE = object()
"""In the place of a tensor like the parameter."""


def _told(value: Any, piece: Tensor) -> Any:
    if isinstance(value, Tensor):
        if value.shape == piece.shape:
            return {"like": True}
        return {"dtype": str(value.dtype).removeprefix("torch."), "value": value.tolist()}
    return {"value": value}


def _value(told: Mapping[str, Any]) -> Any:
    if "like" in told:
        return LIKE
    if "dtype" in told:
        return torch.tensor(told["value"], dtype=getattr(torch, told["dtype"]))
    return told["value"]
