"""The ordered reduction: its arithmetic of ranges, and that the bits of a sum do not depend on the ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.shares import all_shares
from training.arithmetic.balance import Shares, even_shares, ranges
from training.arithmetic.reduce import Subtree, TreeSum, fold, owned_range, places, subtrees

groups = st.integers(1, 33).flatmap(lambda v: st.tuples(st.just(v), st.integers(1, v)))


def wild_leaves(virtual_workers: int, seed: int, num_elements: int = 7) -> list[Tensor]:
    """float32 vectors whose elements differ by many orders of magnitude and cancel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (virtual_workers, num_elements)
    exponents = torch.randint(-30, 31, shape, generator=generator).to(torch.float32)
    return list(torch.randn(shape, generator=generator) * torch.pow(2.0, exponents))


def rank_sums(leaves: list[Tensor], owned: range) -> list[Tensor]:
    """The sums of a rank's subtrees, added up as a rank does: siblings first, then along the tree."""
    sums: list[Tensor] = []
    tree = TreeSum()
    for leaf, place in places(owned).items():
        assert place.subtree == len(sums)
        value = leaves[leaf].clone()
        if place.joins_sibling:
            value = left.add_(value)  # noqa: F821  # as autograd accumulates
        elif not place.ends_subtree:
            left = value  # noqa: F841
            continue
        tree.push(int(place.joins_sibling), value)
        if place.ends_subtree:
            sums.append(tree.total())
    return sums


def sum_on_ranks(leaves: list[Tensor], shares: Shares) -> Tensor:
    """What ranks do, in one process: each adds its own leaves, slices change hands, each folds its slice."""
    plan = [subtree for owned in ranges(shares) for subtree in subtrees(owned)]
    rows = [row for owned in ranges(shares) for row in rank_sums(leaves, owned)]
    slices = zip(*(row.tensor_split(len(shares)) for row in rows), strict=True)
    return torch.cat([fold(plan, [piece.clone() for piece in pieces]) for pieces in slices])


def root(leaves: list[Tensor]) -> Tensor:
    tree = TreeSum()
    for leaf in leaves:
        tree.push(0, leaf.clone())
    return tree.total()


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).tolist()


@given(groups)
@settings(derandomize=True, max_examples=200)
def test_ranges_are_contiguous_complete_and_balanced(group: tuple[int, int]) -> None:
    virtual_workers, world_size = group
    shares = even_shares(virtual_workers, world_size)
    assert [leaf for owned in ranges(shares) for leaf in owned] == list(range(virtual_workers))
    assert list(ranges(shares)) == [owned_range(rank, world_size, virtual_workers) for rank in range(world_size)]
    sizes = set(shares)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@pytest.mark.parametrize("virtual_workers", range(1, 34))
def test_subtrees_are_aligned_cover_and_are_few(virtual_workers: int) -> None:
    most = max(1, math.floor(2 * math.log2(virtual_workers)))
    for start in range(virtual_workers):
        for stop in range(start + 1, virtual_workers + 1):
            found = subtrees(range(start, stop))
            assert [leaf for s in found for leaf in range(s.start, s.start + s.size)] == list(range(start, stop))
            assert all(s.size & (s.size - 1) == 0 and s.start % s.size == 0 for s in found)
            assert len(found) <= most
            assert all(2**s.level == s.size for s in found)


def test_subtrees_of_an_odd_range() -> None:
    assert subtrees(range(3, 9)) == [Subtree(3, 1), Subtree(4, 4), Subtree(8, 1)]


def test_tree_sum_adds_along_the_tree_and_not_from_left_to_right() -> None:
    big = 2.0**24  # big + 1 == big in float32
    leaves = [torch.tensor([value]) for value in (big, 1.0, 1.0, 1.0)]
    tree = TreeSum()
    for leaf in leaves:
        tree.push(0, leaf.clone())
    plain = torch.zeros(1)
    for leaf in leaves:
        plain = plain + leaf
    assert tree.total().item() == big + 2
    assert plain.item() == big


def test_the_right_edge_is_folded_from_the_right() -> None:
    big = 2.0**24
    tree = TreeSum()
    for level, value in ((2, big), (1, 1.0), (0, 1.0)):
        tree.push(level, torch.tensor([value]))
    assert tree.total().item() == big + 2


@given(groups, st.integers(0, 2**32))
@settings(derandomize=True, max_examples=150)
def test_the_sum_has_the_same_bits_on_any_number_of_ranks(group: tuple[int, int], seed: int) -> None:
    virtual_workers, world_size = group
    leaves = wild_leaves(virtual_workers, seed)
    assert bits(sum_on_ranks(leaves, even_shares(virtual_workers, world_size))) == bits(root(leaves))


@pytest.mark.parametrize("virtual_workers", range(1, 11))
def test_the_sum_has_the_same_bits_however_the_leaves_are_shared_out(virtual_workers: int) -> None:
    """Of all ways to share them out, on any number of ranks."""
    leaves = wild_leaves(virtual_workers, seed=virtual_workers)
    worlds = [all_shares(virtual_workers, world_size) for world_size in range(1, virtual_workers + 1)]
    found = [bits(sum_on_ranks(leaves, shares)) for world in worlds for shares in world]
    assert len(found) == 2 ** (virtual_workers - 1)
    assert all(one == bits(root(leaves)) for one in found)


def test_plain_sums_on_ranks_give_other_bits() -> None:
    """So the test above can fail: a rank-local left-to-right sum shows how many ranks there were."""
    leaves = wild_leaves(8, seed=1)

    def plain(world_size: int) -> list[int]:
        partials = []
        for rank in range(world_size):
            owned = [leaves[leaf] for leaf in owned_range(rank, world_size, 8)]
            partials.append(torch.stack(owned).cumsum(dim=0)[-1])
        return bits(torch.stack(partials).cumsum(dim=0)[-1])

    assert len({tuple(plain(world_size)) for world_size in (1, 2, 3, 4)}) > 1


@given(groups)
@settings(derandomize=True, max_examples=200)
def test_each_leaf_has_one_place(group: tuple[int, int]) -> None:
    virtual_workers, world_size = group
    for rank in range(world_size):
        owned = owned_range(rank, world_size, virtual_workers)
        found = places(owned)
        assert list(found) == list(owned)
        assert [place.ends_rank for place in found.values()] == [False] * (len(owned) - 1) + [True]
        assert sum(place.ends_subtree for place in found.values()) == len(subtrees(owned))
        assert all(leaf % 2 == 1 and leaf - 1 in found for leaf, place in found.items() if place.joins_sibling)
