"""Records taken out of a dataset: a new version without them, and a note so that they do not come back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from training.data.lease import Lease, publish, writing
from training.data.manifest import (
    SPLITS,
    Manifest,
    ShardInfo,
    Split,
    describe_shard,
    load_manifest,
    load_shard,
    shard_key,
)
from training.data.shard import Column, Ragged, encode_shard
from training.data.versions import NUM_AT_ONCE, runs_that_used, versions
from training.data.withdrawn import content_of_samples, note_withdrawn, record_of
from training.errors import UserError
from training.objectstore import Store
from training.recipe import Sample


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """What was done to take records out of a version, and where else they are."""

    old_digest: str
    new_digest: str
    num_samples_removed: int
    num_shards_rewritten: int
    num_shards_shared: int
    versions_that_hold_them: tuple[str, ...]
    """Older versions, which never change: they go with `data rm` and `data gc`."""
    versions_that_train_on_them: tuple[str, ...]
    """Those of them that hold the records in their train split."""
    runs_that_used_them: tuple[str, ...]


def withdraw(store: Store, dataset: str, digest: str, record_ids: Collection[str], *, reason: str = "") -> Withdrawal:
    """Make a version without these records, and have every later sharding of the source leave them out too.

    Raises `UserError` naming an id that the version does not hold, before anything is written.
    """
    with writing(store, dataset) as lease:
        return _withdraw(store, dataset, digest, frozenset(record_ids), reason, lease)


def _withdraw(store: Store, dataset: str, digest: str, wanted: frozenset[str], reason: str, lease: Lease) -> Withdrawal:
    old = load_manifest(store, dataset, digest)
    known = {other: load_manifest(store, dataset, other) for other in versions(store, dataset)}
    found = _find(store, dataset, known.values(), wanted)
    mine = {shard: rows for shard, rows in found.items() if any(shard in old.splits[split] for split in SPLITS)}
    missing = wanted - {record for rows in mine.values() for record in rows.values()}
    if missing:
        raise UserError(f"dataset {dataset!r} version {digest[:12]} holds no record {min(missing)!r}")
    new = replace(old, splits={split: _splits_without(store, dataset, old, split, mine) for split in SPLITS})
    note_withdrawn(store, dataset, _contents(store, dataset, mine), reason)
    publish(store, dataset, new, lease)
    trained = _holding(known, found, ["train"])
    return Withdrawal(
        old_digest=digest,
        new_digest=new.digest,
        num_samples_removed=sum(old.num_samples(split) - new.num_samples(split) for split in SPLITS),
        num_shards_rewritten=len(mine),
        num_shards_shared=sum(len(shards) for shards in old.splits.values()) - len(mine),
        versions_that_hold_them=_holding(known, found, SPLITS),
        versions_that_train_on_them=trained,
        runs_that_used_them=runs_that_used(store, trained),
    )


Rows = Mapping[int, str]
"""Rows of a shard that are to go, and their records."""


def _find(
    store: Store, dataset: str, manifests: Iterable[Manifest], wanted: frozenset[str]
) -> dict[ShardInfo, dict[int, str]]:
    """The shards that hold one of the records, each read once however many versions share it."""

    def rows_of(info: ShardInfo) -> dict[int, str]:
        records = map(record_of, load_shard(store, dataset, info).ids)
        return {row: record for row, record in enumerate(records) if record in wanted}

    shards = list(dict.fromkeys(shard for m in manifests for split in SPLITS for shard in m.splits[split]))
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        found = zip(shards, pool.map(rows_of, shards), strict=True)
        return {shard: rows for shard, rows in found if rows}


def _contents(store: Store, dataset: str, found: Mapping[ShardInfo, Rows]) -> dict[str, str]:
    """Each record, and the digest of its samples, which may lie in several shards."""
    samples: dict[str, list[Sample]] = {}
    for info, rows in found.items():
        shard = load_shard(store, dataset, info)
        for row, record in rows.items():
            samples.setdefault(record, []).append({name: column[row] for name, column in shard.columns.items()})
    return {record: content_of_samples(its) for record, its in samples.items()}


def _holding(
    manifests: Mapping[str, Manifest], found: Collection[ShardInfo], splits: Iterable[Split]
) -> tuple[str, ...]:
    wanted = list(splits)
    return tuple(
        d for d, m in manifests.items() if any(shard in found for split in wanted for shard in m.splits[split])
    )


def _splits_without(
    store: Store, dataset: str, old: Manifest, split: Split, doomed: Mapping[ShardInfo, Rows]
) -> tuple[ShardInfo, ...]:
    old_shards = old.splits[split]
    if all(len(doomed.get(shard, ())) == shard.num_samples for shard in old_shards):
        raise UserError(f"without these records dataset {dataset!r} has no sample in its {split} split")
    shards = [_without(store, dataset, s, doomed[s]) if s in doomed else s for s in old_shards]
    return tuple(shard for shard in shards if shard is not None)


def _without(store: Store, dataset: str, info: ShardInfo, rows: Rows) -> ShardInfo | None:
    """The shard without some rows; None if nothing is left."""
    shard = load_shard(store, dataset, info)
    kept = [row for row in range(len(shard)) if row not in rows]
    if not kept:
        return None
    columns = {name: _take(column, kept) for name, column in shard.columns.items()}
    data = encode_shard([shard.id_of(row) for row in kept], columns)
    new = describe_shard(data, num_samples=len(kept))
    store.put_immutable(shard_key(dataset, new.sha256), data)
    return new


def _take(column: Column, rows: list[int]) -> Column:
    if isinstance(column, Ragged):
        return Ragged.stack([column[row] for row in rows])
    return np.take(column, rows, axis=0)
