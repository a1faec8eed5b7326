"""Sums of a shard group's virtual workers, from those of its ranks: subtrees of the one tree, wherever it is cut."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.unit.shares import all_shares
from training.arithmetic.balance import ranges
from training.arithmetic.reduce import TreeSum, fold, subtrees
from training.parallel.scatter import partly_folded


@dataclass(frozen=True)
class Sum:
    """Says how it was added up; a + b is b + a."""

    told: str

    def add_(self, other: Sum) -> Sum:
        return Sum(f"({' '.join(sorted([self.told, other.told]))})")


def summed(leaves: range) -> list[Sum]:
    """Of the leaves' subtrees."""
    found = []
    for subtree in subtrees(leaves):
        tree = TreeSum[Sum]()
        for leaf in range(subtree.start, subtree.start + subtree.size):
            tree.push(0, Sum(str(leaf)))
        found.append(tree.total())
    return found


@pytest.mark.parametrize("virtual_workers", [5, 6, 8, 9])
def test_groups_add_up_whole_subtrees_and_replicas_the_root(virtual_workers: int) -> None:
    """All ways to share virtual workers over two to four ranks, and these over two groups."""
    root = fold(subtrees(range(virtual_workers)), summed(range(virtual_workers)))
    for num_ranks in (2, 3, 4):
        for shares in all_shares(virtual_workers, num_ranks):
            owned = ranges(shares)
            for cut in range(1, num_ranks):
                sums: list[Sum] = []
                plan = []
                for group in (owned[:cut], owned[cut:]):
                    wanted = subtrees(range(group[0].start, group[-1].stop))
                    smaller = [subtree for each in group for subtree in subtrees(each)]
                    found = partly_folded(smaller, [one for each in group for one in summed(each)], wanted)
                    assert found == summed(range(group[0].start, group[-1].stop))
                    sums += found
                    plan += wanted
                assert fold(plan, sums) == root
