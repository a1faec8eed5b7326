"""The training loop of one rank that has a part of the model's state between two steps, and all of it at checkpoints.

Whatever reads all weights between two steps gets them for that time: validation, digests, checkpoints, whoever looks
for the cause of an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import Tensor

from training.checkpoint_loop import CheckpointTrainer
from training.errors import DeterministicError
from training.step import Update, lost_with_a_peer


class SpreadUpdate(Update, Protocol):
    """Of the part that a rank has. training.parallel has them."""

    def whole_state(self) -> AbstractContextManager[None]:
        """Meanwhile the state has all weights, and what the optimizer keeps of them. Collective."""
        ...

    def lent(self) -> AbstractContextManager[Any]:
        """Meanwhile the model has all weights, and each rank may compute it by itself. Collective."""
        ...


class SpreadTrainer(CheckpointTrainer):
    """Trains one run to its end, several ranks together one replica. `train` is collective."""

    _maybe_update: SpreadUpdate | None = None

    @property
    def _knows_its_pace(self) -> bool:
        """Ranks wait for one another within their virtual workers, so all keep as many."""
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waiting for other ranks. If one is lost the group is over, in whatever part of a step."""
        with self.handover.waiting(), lost_with_a_peer():
            yield

    def begin_group(self) -> None:
        """From here on this rank has its part alone."""
        assert self.digest_period >= 0  # which hangs on the size of the whole
        self._maybe_update = self.new_update()

    def new_update(self) -> SpreadUpdate:
        """Takes over the state, which is whole. Collective."""
        raise NotImplementedError

    @property
    def updater(self) -> SpreadUpdate:
        assert self._maybe_update is not None, "a group has begun"
        return self._maybe_update

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile each rank has all weights, and what the optimizer keeps of them."""
        with self.updater.whole_state():
            yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        with self.updater.lent():
            yield

    def give_up(self, worker: int, error: DeterministicError) -> None:
        """Others are in the midst of the step, and without them this rank has no weights to try again with: it goes on
        to the step's end."""
        self._maybe_failure = self._maybe_failure or (worker, error)

    def told_of_failed(self) -> Tensor:
        """In the place of what a virtual worker has to say: by a loss that is none, all ranks hear that it failed."""
        told = self.extras.said(())
        told[self.extras.num_changes] = math.nan
        return told
