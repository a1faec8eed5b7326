"""Samples by their index: shards fetched once, verified on arrival, kept in memory within a bound."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from training.data.manifest import Manifest, ShardInfo, Split, shard_key
from training.data.shard import Shard, decode_shard
from training.documents import fast_digest
from training.errors import DamagedError
from training.objectstore import Store

CACHE_BYTES = 1 << 30


class Reader:
    """Random access to one split of a dataset version.

    Raises `DamagedError` or `MissingError` naming the shard: a damaged dataset never looks like a short one.
    """

    def __init__(
        self, store: Store, dataset: str, manifest: Manifest, split: Split, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self._store = store
        self._dataset = dataset
        self._shards = manifest.splits[split]
        self._ends = list(accumulate(shard.num_samples for shard in self._shards))
        self._cache: OrderedDict[int, Shard] = OrderedDict()
        self._cache_bytes = cache_bytes

    def __len__(self) -> int:
        return self._ends[-1]

    def read(
        self, indices: Sequence[int] | np.ndarray[Any, Any]
    ) -> tuple[list[str], Mapping[str, np.ndarray[Any, Any]]]:
        """Ids and stacked fields ([len(indices), …] each) of the samples, in the order asked for."""
        ids: list[str] = []
        rows: list[dict[str, np.ndarray[Any, Any]]] = []
        for index in indices:
            number = bisect_right(self._ends, int(index))
            shard = self._shard(number)
            row = int(index) - (self._ends[number] - self._shards[number].num_samples)
            ids.append(shard.id_of(row))
            rows.append({name: column[row] for name, column in shard.columns.items()})
        return ids, {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _shard(self, number: int) -> Shard:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        shard = self._fetch(self._shards[number])
        self._cache[number] = shard
        while len(self._cache) > 1 and self._cached_bytes() > self._cache_bytes:
            self._cache.popitem(last=False)
        return shard

    def _cached_bytes(self) -> int:
        return sum(self._shards[number].num_bytes for number in self._cache)

    def _fetch(self, info: ShardInfo) -> Shard:
        key = shard_key(self._dataset, info.sha256)
        data = self._store.get(key)
        if fast_digest(data) != info.xxh3:
            raise DamagedError(f"{self._store.location.uri(key)} is damaged: run the shard stage again to repair it")
        return decode_shard(data, name=info.sha256)
