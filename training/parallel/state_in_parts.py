"""A state of which ranks have parts of matrices, and all of it for whoever wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from training.checkpoints.state import TrainState
from training.parallel.tensor import CutModel, require_elementwise


class StateInParts:
    """This rank's parts of the matrices that are cut, all of everything else, and what the optimizer keeps of these."""

    def __init__(self, state: TrainState, cut: CutModel) -> None:
        """Takes the optimizer's state over, which is whole. Raises `UserError` if that cannot be cut."""
        if cut.slices:
            require_elementwise(state.optimizer)
        self._state = state
        self._cut = cut
        for parameter, slices in cut.slices.items():
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and tuple(value.shape) == slices.shape:
                    state.optimizer.state[parameter][key] = slices.part(value, cut.peers.index, cut.peers.number)

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile it has whole copies of its weights, and of what the optimizer keeps of them. Collective."""
        entries = self._state.optimizer.state
        with self._cut.lent() as copies:
            wholes: dict[Tensor, Any] = {
                copy: self._joined(p, entries[p]) for p, copy in copies.items() if p in entries
            }
            entries.update(wholes)
            try:
                yield
            finally:
                for copy in wholes:
                    del entries[copy]

    def lent(self) -> AbstractContextManager[Any]:
        """Meanwhile it has whole copies of its weights. Collective at its beginning."""
        return self._cut.lent()

    def _joined(self, parameter: Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        """`kept` are the same on each rank but for what is like its part, and for their order: a file's has none."""
        slices, peers = self._cut.slices[parameter], self._cut.peers
        shape = slices.part_shape(peers.number)
        return {
            key: self._cut.joined(parameter, value)
            if isinstance(value, Tensor) and tuple(value.shape) == shape
            else value
            for key, value in sorted(kept.items())
        }
