"""The training loop of one rank with sharded state: it keeps a part of weights, gradients and optimizer, and the bits
are the same (docs/parallelism.md)."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property

from training.arithmetic.balance import ranges
from training.arithmetic.objective import Objective, recipe_errors
from training.diagnosis.poison import Samples
from training.errors import DeterministicError
from training.layout import in_shards
from training.memory.handover import GroupLost
from training.parallel.scatter import make_groups
from training.parallel.sharded import Sharded, ShardedReducer
from training.parallel.update import ShardedUpdate
from training.spread_loop import SpreadTrainer


class ShardedTrainer(SpreadTrainer):
    """Trains one run to its end, `parallel.shard` ranks together one replica. `train` is collective."""

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

    def new_update(self) -> ShardedUpdate:
        return ShardedUpdate(self.state, self.sharded, self.reducer, clip_norm=self.preset.train.clip_norm)

    def fail(self, error: DeterministicError, worker: int, samples: Samples) -> None:
        """Not yet, for the others are to hear of it first."""
        if isinstance(error.__cause__, GroupLost):
            raise error.__cause__
        self.give_up(worker, error)
        self.reducer.give_up(worker, self.told_of_failed())
