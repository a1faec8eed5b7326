"""The training loop of one rank that leaves no whole state in memory: the next group begins at the newest checkpoint,
or where its ranks have copies of all parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from training.arithmetic.extras import Control
from training.beside import beside
from training.control import Note
from training.loop import Trainer
from training.runs.events import Entry


class CheckpointTrainer(Trainer):
    """A group that is to end makes a checkpoint first, so what is lost is lost with a rank alone."""

    def resume(self) -> None:
        """Take up what the ranks have copies of, or the newest proven checkpoint, or begin at step 0."""
        since = self.checkpoints.committed_step
        maybe_journal = self.maybe_take_copies(since)
        if maybe_journal is None:
            since = self.load_checkpoint()
            self.saver.require_agreement(since)
        self.handover.begin_at(self.state.step, maybe_journal or ())
        noting = beside(partial(self.note_resumption, since))
        self.begin_reading(self.state.step)
        noting.result()
        self.checkpoints.committed_step = since
        self.begin_group()
        self.tell_history(source="memory" if maybe_journal is not None else "checkpoint" if since else "start")
        self.tell(Note(event="began", step=self.state.step))

    def maybe_take_copies(self, since: int) -> Sequence[Entry] | None:
        """Have the state of the newest step that ranks have copies of, if it is not older than step `since`; returns
        what is to be told again of the steps after that. None: there are no such copies. Collective."""
        return None

    def begin_group(self) -> None:
        """With all ranks, of the state that was loaded. Collective."""
        raise NotImplementedError

    def wishes(self) -> Control:
        wishes = super().wishes()
        return replace(wishes, checkpoint_and_regroup=wishes.regroup or wishes.checkpoint_and_regroup)
