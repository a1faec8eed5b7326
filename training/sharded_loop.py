"""The training loop of one rank with sharded state: it keeps a part of weights, gradients and optimizer, and the bits
are the same (docs/parallelism.md).

Whatever reads all weights between two steps gets copies of them: validation, digests, checkpoints, whoever looks for
the cause of an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property

from training.arithmetic.balance import ranges
from training.arithmetic.objective import Objective, recipe_errors
from training.checkpoint_loop import CheckpointTrainer
from training.diagnosis.poison import Samples
from training.errors import DeterministicError
from training.layout import in_shards
from training.memory.handover import GroupLost
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.update import ShardedUpdate
from training.step import Update, lost_with_a_peer


class ShardedTrainer(CheckpointTrainer):
    """Trains one run to its end, `parallel.shard` ranks together one replica. `train` is collective."""

    _maybe_update: ShardedUpdate | None = None

    @property
    def _knows_its_pace(self) -> bool:
        """Ranks wait for one another within their virtual workers, so all keep as many."""
        return False

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waiting for other ranks. If one is lost the group is over, in whatever part of a step."""
        with self.handover.waiting(), lost_with_a_peer():
            yield

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

    def begin_group(self) -> None:
        """From here on this rank has its shards alone."""
        clip_norm = self.preset.train.clip_norm
        self._maybe_update = ShardedUpdate(self.state, self.sharded, self.reducer, clip_norm=clip_norm)

    @property
    def updater(self) -> Update:
        assert self._maybe_update is not None, "a group has begun"
        return self._maybe_update

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Meanwhile each rank has copies of all weights, and of what the optimizer keeps of them."""
        assert self._maybe_update is not None, "a group has begun"
        with self._maybe_update.whole_state():
            yield

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        with self.sharded.lent():
            yield

    def fail(self, error: DeterministicError, worker: int, samples: Samples) -> None:
        """Not yet: the others are in the midst of the step, and without them this rank has no weights to try again
        with. They hear of it by a loss that is none."""
        if isinstance(error.__cause__, GroupLost):
            raise error.__cause__
        self._maybe_failure = self._maybe_failure or (worker, error)
        told = self.extras.said(())
        told[self.extras.num_changes] = math.nan
        self.reducer.give_up(worker, told)
