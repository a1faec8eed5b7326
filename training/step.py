"""One synchronous step: what it is made of, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from training.arithmetic.collectives import is_of_lost_peer
from training.arithmetic.extras import Control
from training.arithmetic.norm import block_norms, clip_factor, norm_of
from training.arithmetic.validation import HeldOut
from training.checkpoints.state import TrainState
from training.config import TrainConfig
from training.data.stream import Microbatch
from training.memory.handover import GroupLost
from training.servers.endpoints import PrimaryLost

DIGEST_BYTES_PER_STEP = 4 << 20
"""So much of the weights is hashed per step on average, unless the preset says how often: less than 0.5 ms."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """Which part of the group this process is."""

    rank: int
    world_size: int
    token: int
    device: torch.device


class Reducer(Protocol):
    """Mean gradients over all virtual workers: training.arithmetic.exact or training.arithmetic.fast; or what
    servers make of their sums: training.servers.colocated."""

    owned: range

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor: ...

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None: ...

    def finish(self) -> Tensor: ...

    def close(self) -> None: ...


class Feed(Protocol):
    """Where a rank's samples come from (training.data.loader has the real one)."""

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        """Of the given virtual workers, from `step` on, in the order of (step, worker)."""
        ...

    def held_out(self) -> HeldOut:
        """The samples of the test split."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step gave, the same on every rank."""

    loss: float
    grad_norm: float
    samples: str
    """The step's line in the ledger (training.data.ledger)."""
    control: Control
    """What the ranks decided on the way."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """The means of the held-out scores, if they were due after this step."""


class Update(Protocol):
    """Of one step, after its gradients were summed: here, or on servers (training.servers.colocated)."""

    def clip(self) -> float:
        """Scale the gradients; returns the norm before. It is taken block by block, whoever has which."""
        ...

    def apply(self) -> None:
        """The optimizer's step, at the learning rate that is set."""
        ...


class LocalUpdate:
    """All of it here."""

    def __init__(self, state: TrainState, *, clip_norm: float | None) -> None:
        self._state = state
        self._clip_norm = clip_norm

    def clip(self) -> float:
        gradients = [p.grad for p in self._state.trained.values() if p.grad is not None]
        norm = norm_of(block_norms(gradients))
        factor = clip_factor(norm, self._clip_norm)
        if factor is not None:
            torch._foreach_mul_(gradients, factor)
        return norm

    def apply(self) -> None:
        self._state.optimizer.step()


def digest_period(train: TrainConfig, num_weight_bytes: int) -> int:
    """After so many steps the weights' digest is noted; 0: never, as where no bits are promised."""
    if train.maybe_inexact:
        return 0
    if train.digest_every_steps is not None:
        return train.digest_every_steps
    return max(1, -(-num_weight_bytes // DIGEST_BYTES_PER_STEP))


@contextmanager
def lost_with_a_peer() -> Iterator[None]:
    """Only where the state is that of the last finished step, which the next group goes on with."""
    try:
        yield
    except PrimaryLost as error:
        raise GroupLost(str(error)) from error
    except RuntimeError as error:
        if is_of_lost_peer(error):
            raise GroupLost(str(error)) from error
        raise
