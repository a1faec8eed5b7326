"""The ordered sum over virtual workers, of which each rank gets a shard: the additions of the tree of
training.arithmetic.reduce, and no others.

The ranks of a shard group send one another their shards of their subtrees' sums, and add up what makes whole subtrees
of the group's virtual workers. Where the group has replicas, each shard is then summed over these in the same tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from training.arithmetic.exact import Group
from training.arithmetic.reduce import Subtree, T, fold, subtrees
from training.layout import Dimension, Layout


@dataclass(frozen=True, kw_only=True)
class ShardGroups:
    """This rank's. Two are of the same ranks: one for the training thread, and one for that which sums."""

    gathering: dist.ProcessGroup
    summing: dist.ProcessGroup
    replicas: dist.ProcessGroup


def make_groups(layout: Layout, rank: int, *, timeout: timedelta) -> ShardGroups:
    """Collective over all ranks. A rank that is gone is noticed after `timeout` at the latest."""
    gathering, summing, replicas = (
        own_group(layout, dimension, rank=rank, timeout=timeout) for dimension in ("shard", "shard", "data")
    )
    return ShardGroups(gathering=gathering, summing=summing, replicas=replicas)


def own_group(layout: Layout, *along: Dimension, rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """The ranks that differ from this one in these dimensions alone. Collective over all ranks."""
    groups = layout.groups(*along)
    found = [dist.new_group(list(ranks), timeout=timeout) for ranks in groups]
    mine = found[[rank in ranks for ranks in groups].index(True)]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


class Scatter:
    """From each rank's sums of its subtrees to its shard of the sum over all virtual workers."""

    def __init__(self, layout: Layout, ranges: Sequence[range], rank: int, groups: ShardGroups) -> None:
        """`ranges` are the virtual workers of each rank, from the first to the last."""
        at = layout.coordinates(rank)
        self._group = groups.summing
        self._plans = [subtrees(ranges[number]) for number in layout.group_of(rank, "shard")]
        self._num_own = len(subtrees(ranges[rank]))
        of_groups = [ranges[d * layout.shard].start for d in range(layout.data)] + [ranges[-1].stop]
        self._of_replicas = [range(start, stop) for start, stop in pairwise(of_groups)]
        self._replica = at.data
        self._replicas = groups.replicas

    def scatter(self, rows: Sequence[Tensor]) -> Tensor:
        """`rows` are of this rank's subtrees, each all shards one after another. Collective."""
        num_shards = len(self._plans)
        size = rows[0].numel() // num_shards
        send = rows[0] if len(rows) == 1 else torch.stack([row.view(num_shards, size) for row in rows], 1).view(-1)
        counts = [len(plan) * size for plan in self._plans]
        received = send.new_empty(sum(counts))
        dist.all_to_all_single(received, send, counts, [self._num_own * size] * num_shards, group=self._group)
        everybody = [subtree for plan in self._plans for subtree in plan]
        wanted = subtrees(self._of_replicas[self._replica])
        sums = partly_folded(everybody, list(torch.split(received, size)), wanted)
        return fold(wanted, sums) if len(self._of_replicas) == 1 else self._over_replicas(sums)

    def _over_replicas(self, sums: Sequence[Tensor]) -> Tensor:
        group = Group(self._of_replicas, self._replica, sums[0].device, self._replicas)
        num_replicas = group.world_size
        size = -(-sums[0].numel() // num_replicas) * num_replicas
        rows = sums[0].new_zeros(len(sums), size)
        torch._foreach_copy_([row[: one.numel()] for row, one in zip(rows, sums, strict=True)], list(sums))
        if group.is_in_place:
            group.exchange(rows, rows, rows[0])
            return rows[0][: sums[0].numel()]
        received = rows.new_empty(sum(len(plan) for plan in group.plans) * (size // num_replicas))
        flat = rows.new_empty(size)
        group.exchange(rows, received, flat)
        return flat[: sums[0].numel()]


def partly_folded(plan: Sequence[Subtree], sums: Sequence[T], wanted: Sequence[Subtree]) -> list[T]:
    """The sums of `wanted` subtrees, from those of smaller ones that make them up, both from left to right. They are
    added into."""
    found = []
    begin = 0
    for one in wanted:
        end = begin
        while end < len(plan) and plan[end].start < one.start + one.size:
            end += 1
        found.append(fold(plan[begin:end], sums[begin:end]))
        begin = end
    return found
