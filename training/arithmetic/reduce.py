"""Ordered reduction: what virtual workers give is summed in one fixed binary tree, whoever computed it.

Invariant: the bits of the sum are a function of the V leaves alone. Each addition that is done, on any number of ranks,
is the addition of the two children of one node of the tree below; IEEE 754 addition commutes, and every rank adds whole
subtrees, so who adds, and when, cannot be seen in the result. docs/exactness.md has the proof.

The tree over leaves 0 … V-1: every aligned block of 2^k leaves that lies inside is a node; what remains at the right
edge is folded from the right. (Idea of virtual workers: EasyScale, SC'23; VirtualFlow, MLSys'22.)

Here is the arithmetic; training.arithmetic.exact does it with gradients, while the backward pass goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Term(Protocol):
    """A tensor, or what is added up as tensors are."""

    def add_(self: T, other: T, /) -> T:
        """The sum, which may take this one's place."""
        ...


T = TypeVar("T", bound=Term)


@dataclass(frozen=True)
class Subtree:
    """The aligned block of `size` (a power of two) leaves from `start`."""

    start: int
    size: int

    @property
    def level(self) -> int:
        return self.size.bit_length() - 1


@dataclass(frozen=True)
class Place:
    """Where a leaf stands among those of its rank."""

    joins_sibling: bool
    """The leaf before it is its sibling, and of the same rank: what follows is their sum."""
    subtree: int
    """The number of its subtree among the rank's."""
    ends_subtree: bool
    ends_rank: bool


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


def num_rows(plan: Iterable[Subtree]) -> int:
    """Of sums at a time, where a rank adds up these: the subtrees before, and those on the way in this one."""
    return max((number + max(1, subtree.level) for number, subtree in enumerate(plan)), default=1)


def places(leaves: range) -> dict[int, Place]:
    """Each leaf of a rank, and its place."""
    return {
        leaf: Place(
            joins_sibling=(leaf - subtree.start) % 2 == 1,
            subtree=number,
            ends_subtree=leaf == subtree.start + subtree.size - 1,
            ends_rank=leaf == leaves.stop - 1,
        )
        for number, subtree in enumerate(subtrees(leaves))
        for leaf in range(subtree.start, subtree.start + subtree.size)
    }


class TreeSum(Generic[T]):
    """Adds subtrees' sums, given from left to right, along the tree. Each is added into the one to its left."""

    def __init__(self) -> None:
        self._stack: list[tuple[int, T]] = []

    @property
    def num_waiting(self) -> int:
        """How many sums wait for those to their right."""
        return len(self._stack)

    def push(self, level: int, value: T) -> None:
        """Add the next subtree, of 2^level leaves. `value` is kept, and may be added into."""
        while self._stack and self._stack[-1][0] == level:
            value = self._stack.pop()[1].add_(value)
            level += 1
        self._stack.append((level, value))

    def total(self) -> T:
        """The root: what remains at the right edge is folded from the right. Begins anew after."""
        value = self._stack.pop()[1]
        while self._stack:
            value = self._stack.pop()[1].add_(value)
        return value


def fold(plan: Iterable[Subtree], sums: Iterable[T]) -> T:
    """The root, from the sums of subtrees that cover all leaves, given from left to right. They are added into."""
    tree = TreeSum[T]()
    for subtree, value in zip(plan, sums, strict=True):
        tree.push(subtree.level, value)
    return tree.total()
