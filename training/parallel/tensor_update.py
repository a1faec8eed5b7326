"""Mean gradients of the parts of matrices that a rank has, the optimizer's step on them, and the whole state for
whoever wants it (a checkpoint, a digest)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.exact import BUCKET_BYTES, Bucket, ExactReducer, Group
from training.arithmetic.norm import blocks
from training.checkpoints.state import TrainState
from training.parallel.norms import clip_together
from training.parallel.tensor import CutModel, TensorGroups, require_elementwise


class TensorReducer(ExactReducer):
    """Over all virtual workers, in their tree; then what ranks have of one gradient, in their order. Used like
    `ExactReducer`: what replicas there are changes no bit."""

    def __init__(
        self,
        objective: nn.Module,
        cut: CutModel,
        *,
        groups: TensorGroups,
        num_extras: int,
        ranges: Sequence[range],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """`ranges` are the virtual workers of each replica, from the first to the last."""
        replica = groups.replicas.rank()
        super().__init__(
            objective,
            num_extras=0,
            ranges=ranges,
            rank=replica,
            bucket_bytes=bucket_bytes,
            maybe_processes=groups.replicas,
        )
        self._cut = cut
        device = next(objective.parameters()).device
        self._extras = Bucket([], num_extras, Group(ranges, replica, device, groups.replicas), lambda: None)
        self._maybe_back: int | None = None
        """The virtual worker whose backward pass has begun."""

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        self._maybe_back = None
        return super().forward(worker, batch)

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        self._maybe_back = worker
        super().backward(worker, loss, extras[:0])
        self._end(worker, extras)

    def give_up(self, worker: int, extras: Tensor) -> None:
        """After it failed, or without having begun: the step goes on for the replicas, with zeros for what is
        missing."""
        if self._maybe_back != worker:
            for bucket in self._buckets:
                bucket.begin(self._places[worker])
        for bucket in self._buckets:
            bucket.fill_up()
        self._end(worker, extras)

    def _end(self, worker: int, extras: Tensor) -> None:
        self._extras.begin(self._places[worker])
        self._extras.add_extras(extras)
        self._extras.fill_up()

    def finish(self) -> Tensor:
        """Put the mean gradients of this rank's parts in their places; returns the sum of all extras.

        Of these all ranks of a replica have the same, but for words that one says, where others have zeros; and for
        what one failed at, which is no number."""
        super().finish()
        self._extras.exchange()
        self._cut.sum_partly_summed()
        return self._cut.peers.of_all(self._extras.extras).amax(0)

    def close(self) -> None:
        super().close()
        self._extras.close()


class TensorUpdate:
    """Of one step: each rank updates its parts of the matrices that are cut, and all of everything else."""

    def __init__(self, state: TrainState, cut: CutModel, *, clip_norm: float | None) -> None:
        """Takes the optimizer's state over, which is whole. Raises `UserError` if that cannot be cut."""
        require_elementwise(state.optimizer)
        self._state = state
        self._cut = cut
        self._clip_norm = clip_norm
        self._block_places = [self._places_of_blocks(index) for index in range(cut.peers.number)]
        for parameter, slices in cut.slices.items():
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and tuple(value.shape) == slices.shape:
                    state.optimizer.state[parameter][key] = slices.part(value, cut.peers.index, cut.peers.number)

    def _places_of_blocks(self, index: int) -> Tensor:
        """Where the norms of a rank's blocks stand among those of all: what is not cut has the same on each."""
        found: list[int] = []
        first = 0
        for parameter in self._state.trained.values():
            is_cut = parameter in self._cut.slices
            number = len(blocks(parameter.numel()))
            start = first + index * number * is_cut
            found += range(start, start + number)
            first += number * (self._cut.peers.number if is_cut else 1)
        return torch.tensor(found, dtype=torch.int64)

    def clip(self) -> float:
        """Scale the gradients; returns the norm before, of all parts. Collective."""
        gradients = [p.grad for p in self._state.trained.values() if p.grad is not None]
        peers = self._cut.peers
        return clip_together(
            gradients,
            self._block_places,
            group=peers.group,
            clip_norm=self._clip_norm,
            waiting=peers.waiting,
        )

    def apply(self) -> None:
        """The optimizer's step, at the learning rate that is set."""
        self._state.optimizer.step()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile the state has all of the weights, and of what the optimizer keeps of them: copies. Collective."""
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
        """Meanwhile the model has all weights, and each rank may compute it by itself. Collective at its beginning."""
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
