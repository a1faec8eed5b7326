"""Memory depends on the number of shards, a little, and on the number of samples not at all."""

from __future__ import annotations

from benchmarks.data.scale import compare


def test_a_thousand_times_the_samples_take_little_more_memory() -> None:
    """10^5 to 10^8 samples, each in a process of its own: manifest, order, and a first batch read."""
    assert compare()["growth_mib"] < 50
