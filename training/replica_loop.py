"""The training loop of one rank whose replica has several, all of which have the same virtual workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from training.arithmetic.balance import Balance
from training.layout import Layout
from training.runs.pace import Straggler, maybe_straggler
from training.spread_loop import SpreadTrainer


class ReplicaTrainer(SpreadTrainer):
    """Trains one run to its end. `train` is collective."""

    @property
    def layout(self) -> Layout:
        """Of the group."""
        raise NotImplementedError

    @property
    def round_workers(self) -> int:
        """A replica has a multiple of so many virtual workers."""
        return 1

    @property
    def ranks_per_replica(self) -> int:
        return self.layout.num_ranks // self.layout.data

    def new_balance(self) -> Balance:
        """Over replicas."""
        return Balance(
            self.preset.train.virtual_workers,
            rank=self.layout.coordinates(self.rank.rank).data,
            world_size=self.layout.data,
            over_seconds=0.0,
            multiples_of=self.round_workers,
        )

    def one_to_try(self) -> Mapping[str, Tensor]:
        """Held-out samples, as many as a virtual worker has: none of them is to be trained with."""
        train = self.preset.train
        number = min(train.batch_size // train.virtual_workers, len(self.held_out))
        fields = self.held_out.read(range(number)).fields
        return {name: torch.from_numpy(array).to(self.rank.device) for name, array in fields.items()}

    @property
    def share(self) -> float:
        """Each rank does a part of the replica's work."""
        return super().share / self.ranks_per_replica

    @property
    def tried_workers(self) -> Sequence[int]:
        """They share those of their replica out: each has all weights then."""
        return self.reducer.owned[self.rank.rank % self.ranks_per_replica :: self.ranks_per_replica]

    def straggler(self, outside_seconds: Sequence[float]) -> Straggler | None:
        """Compared with the same stage of other replicas: parts of a model do not take equally long."""
        for ranks in self.layout.groups("data", "tensor"):
            if maybe_slow := maybe_straggler([outside_seconds[rank] for rank in ranks]):
                return replace(maybe_slow, rank=ranks[maybe_slow.rank])
        return None
