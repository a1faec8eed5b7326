"""One to five real ranks: the same bits in exact mode, whoever computes what; other bits with
DistributedDataParallel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.distributed.ranks import RankPool
from tests.distributed.work import sum_digests, sum_digests_of_shares, train_digests, train_with_slow_ranks
from training.arithmetic.balance import even_shares

MAX_RANKS = 5
SIZES = [(5, 1000), (7, 2), (8, 1001), (12, 64), (33, 5)]
NUM_STEPS = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(MAX_RANKS, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


def on_each_world(ranks: RankPool, world_sizes: Sequence[int], function: Any, *arguments: Any) -> list[Any]:
    """One answer for each world size; all ranks of one world must give the same."""
    answers = []
    for world_size in world_sizes:
        found = ranks.run(function, world_size, *arguments)
        assert all(answer == found[0] for answer in found)
        answers.append(found[0])
    return answers


@pytest.mark.parametrize("bucket_bytes", [16, 1 << 20], ids=["many buckets", "one bucket"])
def test_sums_have_the_same_bits_on_any_number_of_ranks(ranks: RankPool, bucket_bytes: int) -> None:
    first, *others = on_each_world(ranks, (1, 2, 3, 5), sum_digests, SIZES, bucket_bytes)
    assert all(answer == first for answer in others)
    assert len(set(first)) == len(SIZES)


@pytest.mark.parametrize(("virtual_workers", "bucket_bytes"), [(5, 16), (6, 1 << 20), (8, 1 << 20)])
def test_sums_have_the_same_bits_however_virtual_workers_are_shared_out(
    ranks: RankPool, virtual_workers: int, bucket_bytes: int
) -> None:
    """On one to five ranks, in all ways."""
    worlds = range(1, min(virtual_workers, MAX_RANKS) + 1)
    answers = on_each_world(ranks, worlds, sum_digests_of_shares, virtual_workers, 9, bucket_bytes)
    assert [len(answer) for answer in answers] == [math.comb(virtual_workers - 1, world - 1) for world in worlds]
    assert len({digest for answer in answers for digest in answer}) == 1


def test_slow_ranks_get_fewer_virtual_workers_and_not_a_bit_changes(ranks: RankPool) -> None:
    """First one is slow, then another."""
    slow_ranks = [1, 2]
    answers = ranks.run(train_with_slow_ranks, 3, slow_ranks, 0)
    num_steps = len(answers[0]["history"])
    (calm,) = ranks.run(train_with_slow_ranks, 1, [], num_steps)
    assert len(calm["history"]) == num_steps
    for answer in answers:
        assert (answer["state"], answer["history"]) == (calm["state"], calm["history"])
        assert answer["shares"] == answers[0]["shares"]
    for slow_rank, shares in zip(slow_ranks, answers[0]["shares"], strict=True):
        assert sum(shares) == 8
        assert shares[slow_rank] == 1 < even_shares(8, 3)[slow_rank]
        assert answers[slow_rank]["num_slow"] > 0
    assert sum(answer["num_computed"] for answer in answers) == 8 * num_steps, "each was computed once"


WORKLOADS = [
    ("tiny", {"validate_every_steps": 2}, (1, 2, 3, 5)),
    ("digits", {"virtual_workers": 8, "batch_size": 32, "clip_norm": 0.5}, (1, 2, 3, 4)),
    ("digits", {"virtual_workers": 12, "batch_size": 36, "clip_norm": 0.5}, (1, 2, 3, 5)),
    ("stdlib", {"virtual_workers": 8, "batch_size": 16, "precision": "bfloat16"}, (1, 3)),
]


@pytest.mark.parametrize(("recipe", "train", "world_sizes"), WORKLOADS, ids=["tiny", "digits-8", "digits-12", "bf16"])
def test_training_gives_the_same_bits_on_any_number_of_ranks(
    ranks: RankPool, recipe: str, train: dict[str, Any], world_sizes: Sequence[int]
) -> None:
    first, *others = on_each_world(ranks, world_sizes, train_digests, recipe, NUM_STEPS, train)
    assert all(answer == first for answer in others)


@pytest.mark.parametrize("kind", ["replaces a buffer", "changes a passing buffer", "changes buffers when judged"])
def test_buffers_of_all_sorts_have_the_same_bits_on_any_number_of_ranks(ranks: RankPool, kind: str) -> None:
    train = {"validate_every_steps": 2}
    first, *others = on_each_world(ranks, (1, 2, 3), train_digests, kind, NUM_STEPS, train)
    assert all(answer == first for answer in others)


def test_validation_has_the_same_bits_on_any_number_of_ranks(ranks: RankPool) -> None:
    """Also with fewer batches than ranks, and where the last batch is not full."""
    for batch_size in (7, 19, 64):
        train = {"validate_every_steps": 1}
        first, *others = on_each_world(ranks, (1, 2, 5), train_digests, "tiny", 1, train, batch_size)
        assert first["validation"][0]["loss"] > 0
        assert all(answer == first for answer in others)


def test_plain_data_parallel_training_gives_other_bits_on_each(ranks: RankPool) -> None:
    """So the tests above can fail. The order of the data is the same even so."""
    train = {"mode": "fast", "virtual_workers": 8, "batch_size": 32}
    answers = on_each_world(ranks, (1, 2, 3), train_digests, "digits", NUM_STEPS, train)
    assert len({answer["weights"] for answer in answers}) == 3
    assert all(answer["ledger"] == answers[0]["ledger"] for answer in answers)
