"""What physics allows: a bare GET or PUT of the same bytes by the quickest client, and the same decoding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.data.contestants.ours import open_store
from benchmarks.data.records import BATCH_SIZE, SHARD_BYTES, Kind
from training.data.shard import decode_shard
from training.reduce import owned_range


def write(kind: Kind, url: str, cache: Path) -> None:
    """Make the samples, and PUT as many bytes, from as many threads as the writer has."""
    store, body = open_store(url), os.urandom(SHARD_BYTES)
    num_shards = -(-kind.num_samples * kind.sample_bytes // SHARD_BYTES)
    ranges = [
        range(n * kind.num_samples // num_shards, (n + 1) * kind.num_samples // num_shards) for n in range(num_shards)
    ]

    def make_and_put(number: int) -> None:
        for index in ranges[number]:
            kind.sample(index)
        store.put(f"floor/{number}", body)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(make_and_put, range(num_shards)))


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    """In the order of the store; there is no quicker way to shuffle than not to."""
    store = open_store(url)
    keys = sorted(key for key, _ in store.list_keys(f"datasets/{kind.name}/shards/"))
    mine = [keys[n] for n in owned_range(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), len(keys))]
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(store.fetch, mine):
            columns = decode_shard(data, name="")
            for start in range(0, len(columns), BATCH_SIZE):
                stop = min(start + BATCH_SIZE, len(columns))
                yield tuple(columns.columns[name][start:stop].copy() for name in ("x", "y"))  # type: ignore[index]
