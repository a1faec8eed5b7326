"""The optimizer's step on the parameters that a rank of a replica has, and the whole state for whoever wants it (a
checkpoint, a digest)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from training.arithmetic.norm import blocks
from training.checkpoints.state import TrainState
from training.parallel.norms import clip_together
from training.parallel.pipeline import Pipeline
from training.parallel.state_in_parts import StateInParts
from training.parallel.state_in_stages import StateInStages


class ReplicaUpdate:
    """Of one step: each rank updates its stage's parameters, of matrices that are cut its parts, and keeps what the
    optimizer wants of these."""

    def __init__(self, state: TrainState, pipeline: Pipeline, *, clip_norm: float | None) -> None:
        """Takes the state over, of which the optimizer's is whole, and frees what is other ranks'."""
        self._state = state
        self._pipeline = pipeline
        self._clip_norm = clip_norm
        self._block_places = [
            _places_of_blocks(state, pipeline, stage=stage, part=part)
            for stage in range(pipeline.num_stages)
            for part in range(pipeline.cut.peers.number)
        ]
        self._parts = StateInParts(state, pipeline.cut)
        self._stages = StateInStages(state, pipeline)

    def clip(self) -> float:
        """Scale the gradients; returns the norm before, of all of the replica. It is taken block by block, in the order
        of all parameters. Collective."""
        return clip_together(
            [p.grad for p in self._state.trained.values() if p.grad is not None],
            self._block_places,
            group=self._pipeline.groups.whole,
            clip_norm=self._clip_norm,
            waiting=self._pipeline.waiting,
        )

    def apply(self) -> None:
        """The optimizer's step, at the learning rate that is set."""
        self._state.optimizer.step()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile the state has all weights, and what the optimizer keeps of them. Collective."""
        with self._stages.whole_state(), self._parts.whole_state():
            yield

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Meanwhile the model has all weights, and each rank may compute it by itself. Collective at its beginning."""
        with self._stages.lent(), self._parts.lent():
            yield


def _places_of_blocks(state: TrainState, pipeline: Pipeline, *, stage: int, part: int) -> Tensor:
    """Where the norms of a rank's blocks stand among those of all: of what is not cut, each rank of its stage has the
    same."""
    cut, first = pipeline.cut, 0
    found: list[int] = []
    for parameter in state.trained.values():
        is_cut = parameter in cut.slices
        number = len(blocks(parameter.numel()))
        if pipeline.stage_of[parameter] == stage:
            start = first + part * number * is_cut
            found += range(start, start + number)
        first += number * (cut.peers.number if is_cut else 1)
    return torch.tensor(found, dtype=torch.int64)
