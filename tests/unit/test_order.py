"""The order of samples: each epoch uses each sample once, whoever reads, and the values never change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.arithmetic.reduce import owned_range
from training.data.order import Order, permute

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "order.json").read_text())


def sequence(order: Order, num_epochs: int) -> np.ndarray:  # type: ignore[type-arg]
    """At least the first `num_epochs` epochs."""
    num_steps = -(-num_epochs * order.num_samples // order.batch_size)
    return np.concatenate([order.batch(step) for step in range(num_steps)])


def one_shard(num_samples: int, seed: int) -> Order:
    """Read one by one."""
    return Order((num_samples,), seed, 1, 1, 1)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    workers = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(1, 17), min_size=1, max_size=50))
    return Order(
        tuple(sizes),
        draw(st.integers(0, 2**63 - 1)),
        workers * draw(st.integers(1, 6)),
        workers,
        draw(st.integers(1, 3)),
    )


@given(order=orders())
@settings(derandomize=True, max_examples=200)
def test_each_epoch_uses_each_sample_once(order: Order) -> None:
    """Also where a batch crosses an epoch, and where an epoch is smaller than a batch."""
    found = sequence(order, 3)
    for epoch in range(3):
        here = found[epoch * order.num_samples : (epoch + 1) * order.num_samples]
        assert np.array_equal(np.sort(here), np.arange(order.num_samples))


@given(order=orders(), step=st.integers(0, 40), num_steps=st.integers(1, 40))
@settings(derandomize=True, max_examples=100)
def test_a_stretch_is_the_same_however_it_is_cut(order: Order, step: int, num_steps: int) -> None:
    for worker in range(order.virtual_workers):
        whole, epochs = order.samples(worker, step=step, num_steps=num_steps)
        pieces = [order.samples(worker, step=step + n)[0] for n in range(num_steps)]
        assert np.array_equal(np.concatenate(pieces), whole)
        assert np.array_equal(epochs, np.sort(epochs))


@given(order=orders(), world_size=st.integers(1, 8), step=st.integers(0, 100))
@settings(derandomize=True, max_examples=100)
def test_batches_are_the_same_for_any_number_of_ranks(order: Order, world_size: int, step: int) -> None:
    """And every rank does the same number of steps: there is one microbatch per virtual worker in each."""
    ranks = [owned_range(rank, world_size, order.virtual_workers) for rank in range(world_size)]
    batch = np.concatenate([order.samples(worker, step=step)[0] for rank in ranks for worker in rank])
    assert np.array_equal(batch, order.batch(step))
    assert len(batch) == order.batch_size


@given(order=orders(), step=st.integers(0, 60))
@settings(derandomize=True, max_examples=100)
def test_shards_are_asked_for_before_they_are_read(order: Order, step: int) -> None:
    """The first sample of a step lies in a shard that was due; nobody asks for more than two windows."""
    for worker in range(order.virtual_workers):
        due = order.shards_ahead(worker, step=step)
        shards, _ = order.shards_of(order.samples(worker, step=step)[0][:1])
        assert int(shards[0]) in due
        assert len(set(due)) == len(due)
        assert order.is_whole or len(due) <= 2 * order.window_shards


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_reads_its_own_part_of_the_dataset_alone(num_ranks: int) -> None:
    """All ranks together touch each shard once in an epoch, but for those that two virtual workers share."""
    order = Order((50,) * 128, 3, 16, 8, 4)
    touched = 0
    for rank in range(num_ranks):
        shards: set[int] = set()
        for worker in owned_range(rank, num_ranks, order.virtual_workers):
            indices, _ = order.samples(worker, step=0, num_steps=order.num_samples // order.batch_size)
            shards |= set(order.shards_of(indices)[0].tolist())
        touched += len(shards)
    assert 128 <= touched <= 128 + num_ranks - 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    for sizes in ((64,), (1,) * 64):
        epochs = (sequence(Order(sizes, seed, 8, 4, 2), 20).reshape(20, 64) for seed in (0, 1))
        found = {tuple(epoch) for both in epochs for epoch in both}
        assert len(found) == 40
        assert tuple(range(64)) not in found


@pytest.mark.parametrize("length", [*range(1, 130), 4095, 4096, 4097, 65_537, 100_003])
def test_permutations_are_permutations(length: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(length), length, 5)), np.arange(length))


def test_far_positions_of_vast_datasets_are_reached_at_once() -> None:
    order = Order((10**9,) * 1000, 1, 64, 8, 4)
    found = order.batch(7 * order.num_samples // 64)
    assert len(set(found.tolist())) == 64
    assert found.min() >= 0
    assert found.max() < order.num_samples


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['num_samples']}-{case['seed']}")
def test_golden_values_of_a_dataset_that_is_shuffled_whole(case: dict[str, int | list[int]]) -> None:
    """Every checkpoint and run key relies on them: a change here is a change of every trained model."""
    start, num_samples, seed, expected = (case[key] for key in ("start", "num_samples", "seed", "samples"))
    assert isinstance(start, int)
    assert isinstance(num_samples, int)
    assert isinstance(seed, int)
    assert isinstance(expected, list)
    found = one_shard(num_samples, seed).samples(0, step=start, num_steps=len(expected))[0]
    assert found.tolist() == expected


@pytest.mark.parametrize("case", GOLDEN["windows"], ids=lambda case: f"{case['step']}")
def test_golden_values_of_a_dataset_in_many_shards(case: dict[str, list[int]]) -> None:
    order = Order(tuple(3 + number % 5 for number in range(40)), 9, 8, 4, 2)
    assert order.batch(case["step"]).tolist() == case["samples"]  # type: ignore[call-overload]


@pytest.mark.parametrize("window_shards", [2, 8, 32])
def test_quality_of_the_shuffle_is_what_the_docs_say(window_shards: int) -> None:
    """A dataset sorted by label, the worst there is: labels vary at most 1 + B / (V x W) times as by chance."""
    num_labels, batch_size, workers = 100, 256, 8
    order = Order((25,) * 1600, 5, batch_size, workers, window_shards)
    assert not order.is_whole
    by_chance = _imbalance(Order((40_000,), 5, batch_size, workers, 1), num_labels)
    measured = _imbalance(order, num_labels) / by_chance
    declared = 1 + batch_size / (workers * window_shards)
    assert 0.7 * declared <= measured <= 1.1 * declared


def _imbalance(order: Order, num_labels: int) -> float:
    """Mean variance over labels of how often one occurs in a batch; lower is better mixed."""
    num_steps = order.num_samples // order.batch_size
    counts = [
        np.bincount(order.batch(step) * num_labels // order.num_samples, minlength=num_labels)
        for step in range(num_steps)
    ]
    return float(np.var(np.stack(counts), axis=0).mean())
