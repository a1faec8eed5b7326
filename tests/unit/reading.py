"""Readers of datasets that tests wrote."""

from __future__ import annotations

from training.data.cache import MEMORY_BYTES, ShardCache, fetch_from
from training.data.manifest import Manifest, Split
from training.data.reader import Decode, Reader
from training.s3.objectstore import Store


def make_reader(
    store: Store,
    dataset: str,
    manifest: Manifest,
    split: Split,
    *,
    memory_bytes: int = MEMORY_BYTES,
    disk_bytes: int = 0,
    maybe_decode: Decode | None = None,
) -> Reader:
    shards = manifest.splits[split]
    cache = ShardCache(fetch_from(store, dataset), shards, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
    return Reader(cache, manifest.shard_sizes(split), manifest.fields, maybe_decode=maybe_decode)
