"""Gives the servers a rank's sums, as soon as the gradients that a shard needs are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat

from torch import Tensor, nn

from training.arithmetic.exact import ExactReducer, Giving
from training.arithmetic.sparse import Rows, RowSums, tables_of
from training.servers.arithmetic import part_of
from training.servers.colocated import Colocated
from training.servers.layout import departures


class ServedReducer:
    """In the place of `ExactReducer`, which gives sums to other ranks.

    While the last virtual worker's backward pass goes on, a thread pushes to the shards whose parameters have their
    gradients: the last ones first. The first shard is the last one, with the extras.
    """

    def __init__(
        self,
        objective: nn.Module,
        servers: Colocated,
        *,
        num_extras: int,
        ranges: Sequence[range],
        rank: int,
        next_step: Callable[[], int],
        say: Callable[[], Tensor],
    ) -> None:
        """A rank without virtual workers has extras to `say` all the same."""
        parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        tables = set(tables_of(objective))
        self._shards = servers.shards_of(objective)
        self._departures = departures(self._shards, len(parameters))
        self._dense = [number for number, one in enumerate(parameters) if one not in tables]
        self._tables = [number for number, one in enumerate(parameters) if one in tables]
        places = {number: place for place, number in enumerate(self._dense)}
        buckets = [[places[number] for number in departure.parameters] for departure in self._departures]
        self._exact = ExactReducer(
            objective,
            num_extras=num_extras,
            ranges=ranges,
            rank=rank,
            maybe_giving=Giving(buckets=buckets, give=self._give),
        )
        self._rows = RowSums(objective, self._exact.owned)
        self._servers = servers
        self._next_step = next_step
        self._say = say
        self.owned = self._exact.owned

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        return self._exact.forward(worker, batch)

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        self._exact.backward(worker, loss, extras)
        self._rows.end_worker(worker)

    def finish(self) -> Tensor:
        """Raises `PrimaryLost`."""
        self._exact.wait()
        pushed = {shard for departure in self._departures for shard in departure.shards} if self.owned else set()
        rows = self._rows.take()
        for shard in reversed(range(len(self._shards))):
            if shard not in pushed:
                self._push(shard, rows)
        return self._servers.finish_step()

    def _give(self, bucket: int) -> None:
        for shard in self._departures[bucket].shards:
            self._push(shard, repeat(()))

    def _push(self, shard: int, rows: Iterable[Sequence[Rows]]) -> None:
        parts = []
        for (subtree, dense, extras), sparse in zip(self._exact.sums(), rows, strict=False):
            gradients: dict[int, Tensor | Rows] = dict(zip(self._dense, dense, strict=True))
            gradients |= zip(self._tables, sparse, strict=False)
            parts.append((subtree, part_of(gradients, self._shards[shard], () if shard else (extras,))))
        maybe_said = None if parts or shard else self._say()
        self._servers.push(self._next_step(), shard, parts, maybe_said)

    def close(self) -> None:
        self._exact.close()
        self._rows.close()
