"""Ordered reduction: gradients of virtual workers are summed in one fixed binary tree, whoever computed them.

Invariant: the bits of the sum are a function of the V leaves alone. Each addition that is done, on any number of ranks,
is the addition of the two children of one node of the tree below; IEEE 754 addition commutes, and every rank adds whole
subtrees, so who adds, and when, cannot be seen in the result. docs/exactness.md has the proof.

The tree over leaves 0 … V-1: every aligned block of 2^k leaves that lies inside is a node; what remains at the right
edge is folded from the right. (Idea of virtual workers: EasyScale, SC'23; VirtualFlow, MLSys'22.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Subtree:
    """The aligned block of `size` (a power of two) leaves from `start`."""

    start: int
    size: int

    @property
    def level(self) -> int:
        return self.size.bit_length() - 1


def owned_range(rank: int, world_size: int, virtual_workers: int) -> range:
    """The virtual workers that a rank computes: contiguous, and balanced to ±1."""
    return range(rank * virtual_workers // world_size, (rank + 1) * virtual_workers // world_size)


def subtrees(leaves: range) -> list[Subtree]:
    """The fewest whole subtrees that make up a contiguous range: at most 2·log2(V)."""
    found: list[Subtree] = []
    start = leaves.start
    while start < leaves.stop:
        size = (start & -start) or 1 << (leaves.stop - start).bit_length()
        while size > leaves.stop - start:
            size >>= 1
        found.append(Subtree(start, size))
        start += size
    return found


class TreeSum:
    """Adds subtrees' sums, given from left to right, along the tree."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, Tensor]] = []

    def push(self, level: int, value: Tensor) -> None:
        """Add the next subtree, of 2^level leaves. `value` is kept, and may be added into."""
        while self._stack and self._stack[-1][0] == level:
            value = self._stack.pop()[1].add_(value)
            level += 1
        self._stack.append((level, value))

    def total(self) -> Tensor:
        """The root: what remains at the right edge is folded from the right."""
        value = self._stack.pop()[1]
        while self._stack:
            value = self._stack.pop()[1].add_(value)
        return value


class OrderedReducer:
    """Sums one vector per virtual worker over all ranks of a group.

    A rank adds its own leaves; an all-to-all hands each rank one slice of every subtree's sum; it adds these in tree
    order; an all-gather returns the whole. `ordered_sum` is collective.
    """

    def __init__(self, *, virtual_workers: int, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self.owned = owned_range(rank, world_size, virtual_workers)
        self._plan = [subtrees(owned_range(r, world_size, virtual_workers)) for r in range(world_size)]
        self._sums: list[Tensor] = []
        self._tree = TreeSum()

    def add(self, leaf: int, vector: Tensor) -> None:
        """Give the vector of the next virtual worker of `owned`, shape [n]. It is kept and added into."""
        self._tree.push(0, vector)
        subtree = self._plan[self._rank][len(self._sums)]
        if leaf == subtree.start + subtree.size - 1:
            self._sums.append(self._tree.total())

    def ordered_sum(self) -> Tensor:
        """The sum over all virtual workers, shape [n], the same bits on every rank. Starts anew after."""
        sums, self._sums = self._sums, []
        if self._world_size == 1:
            return self._fold(sums)
        num_elements = sums[0].numel()
        slice_size = -(-num_elements // self._world_size)
        received = self._exchange(sums, slice_size)
        mine = self._fold([part.clone() for part in torch.split(received, slice_size)])
        gathered = torch.empty(slice_size * self._world_size, dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(gathered, mine)
        return gathered[:num_elements]

    def _exchange(self, sums: list[Tensor], slice_size: int) -> Tensor:
        """One slice of every rank's every subtree sum, in the order of the leaves."""
        padded_size = slice_size * self._world_size
        rows = torch.stack([torch.nn.functional.pad(s, (0, padded_size - s.numel())) for s in sums])
        send = rows.view(len(sums), self._world_size, slice_size).transpose(0, 1).reshape(-1)
        counts = [len(plan) * slice_size for plan in self._plan]
        received = torch.empty(sum(counts), dtype=send.dtype, device=send.device)
        dist.all_to_all_single(received, send, counts, [len(sums) * slice_size] * self._world_size)
        return received

    def _fold(self, sums: list[Tensor]) -> Tensor:
        tree = TreeSum()
        for subtree, value in zip((s for plan in self._plan for s in plan), sums, strict=True):
            tree.push(subtree.level, value)
        return tree.total()
