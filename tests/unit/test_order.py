"""The order of samples: a permutation in each epoch, one sequence over all, and values that never change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.order import samples_at, virtual_worker_range

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "order.json").read_text())


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_each_epoch_is_a_permutation_for_all_small_sizes(seed: int) -> None:
    for num_samples in range(1, 301):
        epochs = samples_at(0, 2 * num_samples, num_samples=num_samples, seed=seed).reshape(2, num_samples)
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(num_samples))


@pytest.mark.parametrize("num_samples", [4095, 4096, 4097, 65_537, 100_003])
def test_each_epoch_is_a_permutation_for_larger_sizes(num_samples: int) -> None:
    epoch = samples_at(3 * num_samples, num_samples, num_samples=num_samples, seed=5)
    assert np.array_equal(np.sort(epoch), np.arange(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(samples_at(epoch * 64, 64, num_samples=64, seed=seed).tolist()) for epoch in range(20) for seed in (0, 1)
    }
    assert len(orders) == 40
    assert tuple(range(64)) not in orders


@given(
    num_samples=st.integers(1, 50),
    start=st.integers(0, 500),
    counts=st.lists(st.integers(0, 40), max_size=8),
    seed=st.integers(0, 2**63 - 1),
)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_a_stretch_is_the_same_however_it_is_cut(num_samples: int, start: int, counts: list[int], seed: int) -> None:
    whole = samples_at(start, sum(counts), num_samples=num_samples, seed=seed).tolist()
    pieces: list[int] = []
    for count in counts:
        pieces += samples_at(start + len(pieces), count, num_samples=num_samples, seed=seed).tolist()
    assert pieces == whole


@given(share=st.integers(1, 9), virtual_workers=st.integers(1, 16), step=st.integers(0, 10**9))
@settings(derandomize=True, max_examples=100)
def test_virtual_workers_split_the_batch_without_gap_or_overlap(share: int, virtual_workers: int, step: int) -> None:
    batch_size = share * virtual_workers
    position = step * batch_size
    for worker in range(virtual_workers):
        start, count = virtual_worker_range(worker, step=step, batch_size=batch_size, virtual_workers=virtual_workers)
        assert (start, count) == (position, share)
        position += count
    assert position == (step + 1) * batch_size


@pytest.mark.parametrize("virtual_workers", [1, 2, 3, 4, 6, 12])
def test_a_batch_is_the_same_for_any_number_of_virtual_workers(virtual_workers: int) -> None:
    batch: list[int] = []
    for worker in range(virtual_workers):
        start, count = virtual_worker_range(worker, step=4, batch_size=12, virtual_workers=virtual_workers)
        batch += samples_at(start, count, num_samples=31, seed=3).tolist()
    assert batch == samples_at(48, 12, num_samples=31, seed=3).tolist()


def test_far_positions_of_vast_datasets_are_reached_at_once() -> None:
    num_samples = 10**12
    found = samples_at(7 * num_samples - 2, 4, num_samples=num_samples, seed=1)
    assert len(set(found.tolist())) == 4
    assert found.min() >= 0
    assert found.max() < num_samples


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['num_samples']}-{case['seed']}")
def test_golden_values(case: dict[str, int | list[int]]) -> None:
    """Every checkpoint and run key relies on them: a change here is a change of every trained model."""
    start, num_samples, seed, expected = (case[key] for key in ("start", "num_samples", "seed", "samples"))
    assert isinstance(start, int)
    assert isinstance(num_samples, int)
    assert isinstance(seed, int)
    assert isinstance(expected, list)
    assert samples_at(start, len(expected), num_samples=num_samples, seed=seed).tolist() == expected
