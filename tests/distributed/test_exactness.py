"""One, two or three real ranks: the same bits with the ordered reduction, other bits with plain averaging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.distributed.ranks import RankPool
from tests.distributed.work import PlainReducer, sum_digests, train_digests
from training.reduce import OrderedReducer

WORLD_SIZES = (1, 2, 3)
SIZES = [(3, 1), (4, 7), (5, 1000), (7, 2), (8, 1001), (12, 64), (33, 5)]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(max(WORLD_SIZES), tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


def on_each_world(ranks: RankPool, function: Any, *arguments: Any) -> list[Any]:
    """One answer for each world size; all ranks of one world must give the same."""
    answers = []
    for world_size in WORLD_SIZES:
        found = ranks.run(function, world_size, *arguments)
        assert all(answer == found[0] for answer in found)
        answers.append(found[0])
    return answers


def test_an_ordered_sum_has_the_same_bits_on_any_number_of_ranks(ranks: RankPool) -> None:
    one, two, three = on_each_world(ranks, sum_digests, OrderedReducer, SIZES)
    assert one == two == three
    assert len(set(one)) == len(SIZES)


def test_a_plain_sum_does_not(ranks: RankPool) -> None:
    """So the test above can fail."""
    one, two, three = on_each_world(ranks, sum_digests, PlainReducer, SIZES)
    assert one != two
    assert one != three


@pytest.mark.parametrize("recipe", ["tiny", "digits"])
def test_training_gives_the_same_bits_on_any_number_of_ranks(ranks: RankPool, recipe: str) -> None:
    one, two, three = on_each_world(ranks, train_digests, recipe, NUM_STEPS, OrderedReducer)
    assert one == two == three


def test_training_with_plain_averaging_gives_other_bits_on_each(ranks: RankPool) -> None:
    answers = on_each_world(ranks, train_digests, "digits", NUM_STEPS, PlainReducer)
    assert len({answer["weights"] for answer in answers}) == len(WORLD_SIZES)
