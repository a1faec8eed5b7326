"""The training loop of one rank with sharded state: it keeps a part of weights, gradients and optimizer, and the bits
are the same (docs/parallelism.md)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property

import torch
from torch import Tensor

from training.arithmetic.balance import ranges
from training.arithmetic.collectives import of_all_ranks
from training.arithmetic.extras import Control
from training.arithmetic.objective import Objective, recipe_errors
from training.diagnosis.poison import Samples
from training.errors import DamagedError, DeterministicError, InfrastructureError
from training.layout import in_shards
from training.memory.copies import Complete, Part, agreed, distance, gathered, named, swapped
from training.memory.handover import GroupLost
from training.memory.slots import Held
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.update import ShardedUpdate, joined
from training.runs.events import Entry
from training.spread_loop import SpreadTrainer

log = logging.getLogger(__name__)


class ShardedTrainer(SpreadTrainer):
    """Trains one run to its end, `parallel.shard` ranks together one replica. `train` is collective."""

    _has_taken_copies = False

    @cached_property
    def sharded(self) -> Sharded:
        """The model, once its state was loaded. Collective."""
        rank, model, launch = self.rank.rank, self.state.model, self.preset.launch
        layout = in_shards(self.rank.world_size, self.preset.parallel.shard)
        with self.together():
            groups = make_groups(layout, rank, timeout=timedelta(seconds=launch.collective_timeout_seconds))
        with recipe_errors("blocks()"):
            blocks = self.recipe.blocks(model)
        return Sharded(model, blocks, layout=layout, rank=rank, groups=groups, waiting=self.together)

    @cached_property
    def reducer(self) -> ShardedReducer:
        return ShardedReducer(
            Objective(self.recipe, self.state.model, precision=self.preset.train.precision),
            self.sharded,
            num_extras=self.extras.num_elements,
            ranges=ranges(self.balance.shares),
        )

    @property
    def updater(self) -> ShardedUpdate:
        found = super().updater
        assert isinstance(found, ShardedUpdate)
        return found

    def begin_group(self) -> None:
        """What was taken up may have lost one of its two nodes: each part is copied anew, beside where it came from."""
        super().begin_group()
        if self._has_taken_copies:
            self.copy()

    def new_update(self) -> ShardedUpdate:
        return ShardedUpdate(self.state, self.sharded, self.reducer, clip_norm=self.preset.train.clip_norm)

    def maybe_take_copies(self, since: int) -> Sequence[Entry] | None:
        if not self.preset.parallel.copy_every_steps:
            return None
        own = self.handover.copies(since=since)
        with self.together():
            maybe_complete = agreed(own)
            if maybe_complete is None:
                return None
            maybe_entries = self._maybe_taken(maybe_complete, own)
            have_all = bool(of_all_ranks(torch.tensor([maybe_entries is not None])).all())
        if maybe_entries is None or not have_all:
            self.state = self.new_state()
            return None
        self._has_taken_copies = True
        return [entry for entry in maybe_entries if entry.step > since]

    def _maybe_taken(self, complete: Complete, own: Sequence[Held]) -> Sequence[Entry] | None:
        """The journal; None if something did not arrive whole, or does not fit, maybe on this rank alone: then its
        state is none. Collective."""
        try:
            parts, entries = gathered(complete, own, rank=self.rank.rank)
            self.state.load(joined(parts, self.state), step=complete.step, may_keep=True)
        except (DamagedError, InfrastructureError):
            log.exception("copies in memory of step %d cannot be taken up: it is the newest checkpoint", complete.step)
            return None
        return entries

    def after_step(self, control: Control) -> None:
        super().after_step(control)
        every = self.preset.parallel.copy_every_steps
        if every and self.state.step % every == 0:
            self.copy()

    def copy(self) -> None:
        """Keep this rank's part in memory, and that of another node."""
        layout, rank = self.sharded.layout, self.rank.rank
        own = named(Part(layout.shard, layout.coordinates(rank).shard), self.updater.part())
        far = distance(layout, self.preset.launch.processes_per_node)
        theirs: dict[str, Tensor] = {}
        if far:
            with self.together():
                theirs = swapped(own, self.state.step, rank=rank, num_ranks=layout.num_ranks, distance=far)
        self.handover.put_copy({**own, **theirs})

    def fail(self, error: DeterministicError, worker: int, samples: Samples) -> None:
        """Not yet, for the others are to hear of it first."""
        if isinstance(error.__cause__, GroupLost):
            raise error.__cause__
        self.give_up(worker, error)
        self.reducer.give_up(worker, self.told_of_failed())
