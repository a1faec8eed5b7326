"""How ranks share the work: a pure value, and the arithmetic of which rank stands where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Literal

from training.errors import UserError

Dimension = Literal["data", "pipeline", "shard", "tensor"]
OUTER_TO_INNER: tuple[Dimension, ...] = ("data", "pipeline", "shard", "tensor")
"""The innermost says the most, and to ranks that stand nearest; the outermost may lose a node, and the others go on."""
Schedule = Literal["gpipe", "1f1b", "interleaved"]
"""Of a pipeline: in which order its ranks compute (training.parallel.schedule)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Into so many parts each dimension of the work is cut. There are as many ranks as the product says."""

    data: int = 1
    """Replicas of all that follows, each with virtual workers of its own."""
    shard: int = 1
    """So many ranks keep a part of weights, gradients and optimizer each, and have virtual workers of their own."""
    pipeline: int = 1
    """So many ranks have consecutive parts of the model each, and the same virtual workers, one after another."""
    tensor: int = 1
    """So many ranks have a part of each matrix, and the same virtual workers at the same time."""

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) < 1:
                raise UserError(f"parallel.{one.name} = {getattr(self, one.name)}: must be at least 1")

    @property
    def num_ranks(self) -> int:
        return math.prod(self._sizes)

    @property
    def num_feeds(self) -> int:
        """Over so many groups of ranks the virtual workers are split."""
        return self.data * self.shard

    @property
    def _sizes(self) -> list[int]:
        return [getattr(self, name) for name in OUTER_TO_INNER]

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.num_ranks:
            raise UserError(f"rank {rank} is none of the {self.num_ranks} of {self}")
        found = {}
        for name in reversed(OUTER_TO_INNER):
            rank, found[name] = divmod(rank, getattr(self, name))
        return Coordinates(**found)

    def rank_of(self, at: Coordinates) -> int:
        rank = 0
        for name in OUTER_TO_INNER:
            rank = rank * getattr(self, name) + getattr(at, name)
        return rank

    def feed_of(self, rank: int) -> int:
        """Which part of the virtual workers it computes, or helps to."""
        at = self.coordinates(rank)
        return at.data * self.shard + at.shard

    def groups(self, *along: Dimension) -> tuple[tuple[int, ...], ...]:
        """The ranks that differ in these dimensions alone, in order: every rank is in one group."""
        found: dict[Coordinates, list[int]] = {}
        for rank in range(self.num_ranks):
            at = replace(self.coordinates(rank), **dict.fromkeys(along, 0))
            found.setdefault(at, []).append(rank)
        return tuple(tuple(ranks) for ranks in found.values())

    def group_of(self, rank: int, *along: Dimension) -> tuple[int, ...]:
        return next(group for group in self.groups(*along) if rank in group)

    def over(self, num_ranks: int) -> Layout:
        """The same with as many replicas as there are ranks for: what a group does that has lost some, or got more."""
        per_replica = self.num_ranks // self.data
        if num_ranks < per_replica or num_ranks % per_replica:
            raise UserError(
                f"parallel.shard × pipeline × tensor = {self.shard} × {self.pipeline} × {self.tensor} ranks make a"
                f" replica, and {num_ranks} are no multiple of {per_replica}: change launch.nodes or"
                " launch.processes_per_node, or one of the three"
            )
        return replace(self, data=num_ranks // per_replica)

    def require(self, *, num_ranks: int, virtual_workers: int) -> None:
        """Raises `UserError` unless there are as many ranks, and work for each."""
        if self.num_ranks != num_ranks:
            raise UserError(
                f"parallel: {self} is for {self.num_ranks} ranks, and launch.nodes × launch.processes_per_node ="
                f" {num_ranks}: set parallel.data, or one of these"
            )
        if self.num_feeds > virtual_workers:
            raise UserError(
                f"parallel.data × parallel.shard = {self.num_feeds}, more than train.virtual_workers ="
                f" {virtual_workers}: each of these ranks needs one"
            )

    def __str__(self) -> str:
        named = {name: size for name, size in asdict(self).items() if size > 1}
        return " × ".join(f"{name} {size}" for name, size in named.items()) or "one rank"


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a rank stands."""

    data: int = 0
    shard: int = 0
    pipeline: int = 0
    tensor: int = 0


def in_shards(num_ranks: int, shard: int) -> Layout:
    """With so many shards; where a group has lost ranks, and what is left is no multiple, as many as divide both."""
    num_shards = math.gcd(num_ranks, shard)
    return Layout(data=num_ranks // num_shards, shard=num_shards)


def in_stages(num_ranks: int, pipeline: int, *, tensor: int = 1) -> Layout:
    """With so many stages; where a group has lost ranks, and what is left is no multiple, the most below that divide
    it. The number of parts of each matrix stays: bits depend on it. Raises `UserError` if the ranks are no multiple of
    that."""
    num_pipes = Layout(tensor=tensor).over(num_ranks).data
    num_stages = max(number for number in range(1, pipeline + 1) if num_pipes % number == 0)
    return Layout(data=num_pipes // num_stages, pipeline=num_stages, tensor=tensor)


def layouts(num_ranks: int, *, max_pipeline: int = 1, max_tensor: int = 1, max_feeds: int) -> Iterator[Layout]:
    """All of so many ranks, the plainest first."""
    divisors = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0]
    for tensor, pipeline, shard in product(divisors, repeat=3):
        per_replica = tensor * pipeline * shard
        if tensor > max_tensor or pipeline > max_pipeline or num_ranks % per_replica:
            continue
        found = Layout(data=num_ranks // per_replica, shard=shard, pipeline=pipeline, tensor=tensor)
        if found.num_feeds <= max_feeds:
            yield found
