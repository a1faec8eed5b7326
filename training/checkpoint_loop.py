"""The training loop of one rank whose group leaves nothing in memory: the next one begins at the newest checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from training.arithmetic.extras import Control
from training.beside import beside
from training.control import Note
from training.loop import Trainer


class CheckpointTrainer(Trainer):
    """A group that is to end makes a checkpoint first, so what is lost is lost with a rank alone."""

    def resume(self) -> None:
        """Take up the newest proven checkpoint, or begin at step 0."""
        since = self.load_checkpoint()
        self.saver.require_agreement(since)
        noting = beside(partial(self.note_resumption, since))
        self.begin_reading(since)
        noting.result()
        self.checkpoints.committed_step = since
        self.begin_group()
        self.handover.step = since
        source = "checkpoint" if since else "start"
        self.emit("attempt", world_size=self.rank.world_size, resumed_from=since, source=source)
        self.tell(Note(event="began", step=since))

    def begin_group(self) -> None:
        """With all ranks, of the state that was loaded. Collective."""
        raise NotImplementedError

    def wishes(self) -> Control:
        wishes = super().wishes()
        return replace(wishes, checkpoint_and_regroup=wishes.regroup or wishes.checkpoint_and_regroup)
