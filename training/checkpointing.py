"""When a rank saves the state: as often as is due, never at the price of a step, and for sure at the end."""

from __future__ import annotations

import time
from typing import Protocol

from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.state import TrainState
from training.config import TrainConfig
from training.errors import DamagedError, InfrastructureError
from training.memory.handover import Handover
from training.runs.record import CheckpointRef

PATIENCE_SECONDS = 2.0
"""How long a checkpoint that is due waits for the one before it."""


class Emit(Protocol):
    def __call__(self, kind: str, *, step: int, **values: object) -> None: ...


class Checkpointing:
    """Of one rank in one group. All methods that save are collective, in that all ranks must call them alike."""

    def __init__(
        self, config: TrainConfig, *, saver: CheckpointSaver, handover: Handover, emit: Emit, committed_step: int
    ) -> None:
        self._config = config
        self._saver = saver
        self._handover = handover
        self.emit = emit
        self._is_late = False
        self._maybe_newest: CheckpointRef | None = None
        self.committed_step = committed_step
        """Of the newest checkpoint that this rank knows to be named by the record."""

    def may_begin(self, step: int) -> bool:
        """Whether a checkpoint is due after that step, and the one before is out of the way. A store that is away
        makes it late, and the training no slower."""
        is_due = step % self._config.checkpoint_every_steps == 0
        if step == self._config.steps or not (is_due or self._is_late):
            return False
        patience = 0.0 if self._is_late else PATIENCE_SECONDS
        with self._handover.waiting():
            self._is_late = not self._saver.is_settled(patience)
        return not self._is_late

    def begin(self, state: TrainState) -> None:
        """Start saving, off this thread."""
        self._settle(state.step)
        self._save(state)

    def save_in_time(self, state: TrainState, end: float, *, is_begun: bool) -> None:
        """The last one of this group, if that can be done by `end` (time.monotonic())."""
        if not is_begun and self._is_settled_by(end):
            self.begin(state)
        if self._is_settled_by(end):
            self._settle(state.step)
            with self._handover.waiting():
                self._saver.wait_for_rank_0(state.step, end - time.monotonic())

    def prove_last(self, state: TrainState) -> CheckpointRef | None:
        """The last one of the run: named by the record, or an error says why not. Rank 0 alone is told how."""
        self._settle(state.step)
        self._save(state)
        with self._handover.waiting():
            self._saver.wait()
        return self._maybe_newest

    def abandon(self) -> None:
        self._saver.abandon()

    def _is_settled_by(self, end: float) -> bool:
        with self._handover.waiting():
            return self._saver.is_settled(end - time.monotonic())

    def _settle(self, step: int) -> None:
        """Wait for the one before. A store that is away makes a checkpoint missing, never the training stop."""
        with self._handover.waiting():
            try:
                self._saver.wait()
            except (InfrastructureError, DamagedError) as error:
                self.emit("checkpoint_failed", step=step, reason=str(error))

    def _save(self, state: TrainState) -> None:
        figures, started = self._handover.figures, time.monotonic()
        agreed = state.unsummed_digests()
        num_bytes = self._saver.save(state.step, state.tensors(), agreed=agreed, on_commit=self._note_commit)
        figures.checkpoint_bytes += num_bytes
        figures.checkpoint_seconds += time.monotonic() - started

    def _note_commit(self, checkpoint: CheckpointRef) -> None:
        """On rank 0 only."""
        self._maybe_newest = checkpoint
        self.committed_step = checkpoint.step
        self._handover.figures.checkpoint_step, self._handover.figures.checkpoint_time = checkpoint.step, time.time()
        self.emit("checkpoint", step=checkpoint.step, sha256=checkpoint.sha256)
