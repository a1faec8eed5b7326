"""How many virtual workers each rank gets: in proportion to its speed, the same on all, and not a change in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.unit.shares import all_shares
from training.arithmetic.balance import (
    MIN_GAIN,
    NUM_PARTS,
    Balance,
    Change,
    Seconds,
    Shares,
    better_shares,
    even_shares,
    quickest_shares,
    ranges,
    step_seconds,
)

Workers = Sequence[float]
"""What a virtual worker takes each rank, in seconds."""


def costs(workers: Workers, fixed: float = 0.0) -> Seconds:
    return np.array([(fixed, seconds) for seconds in workers])


@pytest.mark.parametrize(
    ("workers", "shares"),
    [
        ([1, 1], (8, 8)),
        ([1, 3], (12, 4)),
        ([1, 1, 2], (6, 7, 3)),
        ([1, 1, 1, 1, 4], (4, 4, 4, 3, 1)),
        ([1, 1000], (15, 1)),
    ],
)
def test_shares_are_in_proportion_to_speed(workers: Workers, shares: Shares) -> None:
    found = quickest_shares(16, costs(workers))
    assert sorted(zip(workers, found, strict=True)) == sorted(zip(workers, shares, strict=True))


def test_no_other_shares_make_a_shorter_step() -> None:
    chance = np.random.default_rng(1)
    for _ in range(200):
        virtual_workers = int(chance.integers(1, 9))
        world_size = int(chance.integers(1, virtual_workers + 1))
        seconds = chance.lognormal(size=(world_size, 2))
        found = quickest_shares(virtual_workers, seconds)
        assert sum(found) == virtual_workers
        assert min(found) >= 1
        others = all_shares(virtual_workers, world_size)
        assert step_seconds(found, seconds) == min(step_seconds(shares, seconds) for shares in others)


def test_ranges_are_contiguous_and_complete() -> None:
    assert ranges((3, 1, 4)) == (range(3), range(3, 4), range(4, 8))


def test_ranks_that_are_alike_keep_even_shares() -> None:
    """Those that they have without any of this."""
    for virtual_workers, world_size in ((8, 3), (16, 5), (7, 7), (5, 1)):
        even = even_shares(virtual_workers, world_size)
        assert better_shares(even, costs([2.0] * world_size, fixed=0.5)) == even


def test_a_small_gain_is_none() -> None:
    assert better_shares((50, 50), costs([1.0, MIN_GAIN])) == (50, 50)
    assert better_shares((50, 50), costs([1.0, 1.5])) == (60, 40)
    assert better_shares((1, 1), costs([1.0, 9.0])) == (1, 1), "one that has one virtual worker keeps it"


class Group:
    """The ranks of a group, as each of them keeps its balance; what it takes each of them is given."""

    def __init__(
        self,
        virtual_workers: int,
        world_size: int,
        *,
        over_seconds: float = 1.0,
        num_computing: int | None = None,
        multiples_of: int = 1,
    ) -> None:
        options: dict[str, Any] = {
            "over_seconds": over_seconds,
            "num_computing": num_computing,
            "multiples_of": multiples_of,
        }
        self.ranks = [
            Balance(virtual_workers, rank=rank, world_size=world_size, **options) for rank in range(world_size)
        ]

    @property
    def shares(self) -> Shares:
        (shares,) = {rank.shares for rank in self.ranks}
        return shares

    def step(self, workers: Workers, *, fixed: float = 0.001) -> Change | None:
        """All ranks hear the sum of what all say, which is exact, in float32."""
        said = np.array([rank.words() for rank in self.ranks], np.float32).sum(axis=0)
        for rank, share, seconds in zip(self.ranks, self.shares, workers, strict=True):
            rank.hear(said.tolist())
            rank.note(fixed, share * seconds)
        changes = [rank.maybe_change() for rank in self.ranks]
        assert len({change and change.shares for change in changes}) == 1
        return changes[0]

    def steps(self, count: int, workers: Callable[[], Workers]) -> list[Shares]:
        """Those that they changed to."""
        changes = [self.step(workers()) for _ in range(count)]
        return [change.shares for change in changes if change is not None]


def test_a_slow_rank_gets_fewer_and_gets_them_back() -> None:
    group = Group(16, 4)
    assert group.steps(100, lambda: [0.01] * 4) == []
    assert group.steps(100, lambda: [0.01, 0.03, 0.01, 0.01]) == [(5, 1, 5, 5)]
    assert group.steps(100, lambda: [0.01] * 4) == [(4, 4, 4, 4)]


def test_what_was_measured_with_other_shares_does_not_count() -> None:
    """Nor the first step of all, of which nobody knows yet what it took. Long steps are a part of the time each."""
    group = Group(8, 2)
    assert [group.step([1.0, 3.0]) is not None for _ in range(NUM_PARTS + 1)] == [False] * NUM_PARTS + [True]
    assert group.shares == (6, 2)
    assert [group.step([3.0, 1.0]) is not None for _ in range(NUM_PARTS + 1)] == [False] * NUM_PARTS + [True]
    assert group.shares == (2, 6)


def test_noise_changes_nothing() -> None:
    """Each virtual worker takes half as long or twice as long, as chance has it."""
    chance = np.random.default_rng(2)
    for virtual_workers, world_size in ((8, 2), (64, 4), (64, 16)):
        group = Group(virtual_workers, world_size)
        assert group.steps(500, lambda size=world_size: chance.lognormal(-7, 0.3, size).tolist()) == []  # type: ignore[misc]


def test_a_moment_of_trouble_changes_nothing() -> None:
    group = Group(16, 4)
    for _ in range(20):
        assert group.steps(50, lambda: [0.01] * 4) == []
        assert group.steps(1, lambda: [0.01, 0.01, 0.01, 2.0]) == []


def test_trouble_that_comes_again_and_again_counts_by_its_mean() -> None:
    """A rank under a quota of the kernel's runs and is stopped in turns: most of its steps are as quick as the
    others'."""
    group = Group(16, 2)
    turns = iter(range(10**6))
    found = group.steps(400, lambda: [0.001, 0.001 if next(turns) % 4 else 0.009])
    assert found
    assert group.shares[0] >= 2 * group.shares[1]


@pytest.mark.parametrize("group", [Group(8, 2, over_seconds=0.0), Group(8, 1)], ids=["is off", "is alone"])
def test_who_does_not_balance_says_nothing(group: Group) -> None:
    assert group.ranks[0].words() == []
    even = group.shares
    assert group.steps(50, lambda: [1.0, 9.0][: len(group.ranks)]) == []
    assert group.shares == even


def test_what_a_rank_would_do_with_an_even_share() -> None:
    group = Group(16, 4)
    assert [rank.seconds_at_even_shares(1.0, 10.0) for rank in group.ranks] == [11.0] * 4
    group.steps(100, lambda: [0.01, 0.03, 0.01, 0.01])
    assert [rank.seconds_at_even_shares(1.0, 10.0) for rank in group.ranks] == [9.0, 41.0, 9.0, 9.0]


def test_shares_of_whole_rounds() -> None:
    assert even_shares(12, 5, multiples_of=2) == (2, 2, 2, 2, 4)
    assert even_shares(12, 2, multiples_of=4) == (4, 8)
    assert Group(6, 2, over_seconds=0.0, multiples_of=2).shares == (2, 4)


def test_ranks_that_compute_nothing_have_no_share_and_none_of_the_blame() -> None:
    group = Group(16, 4, num_computing=2)
    assert group.shares == (8, 8, 0, 0)
    assert group.steps(100, lambda: [0.01, 0.03, 0.0, 0.0])[-1] == (12, 4, 0, 0)
    assert group.ranks[3].seconds_at_even_shares(1.0, 0.0) == 1.0
