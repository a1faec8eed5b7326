"""Records taken out of a dataset: a list of ids that grows, and a new version without them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime

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
from training.errors import InfrastructureError, UserError
from training.objectstore import MissingError, Store

FORMAT = 1


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


def withdrawn_key(dataset: str) -> str:
    return f"datasets/{dataset}/withdrawn.json"


def withdrawn_ids(store: Store, dataset: str) -> frozenset[str]:
    """Ids of the records that every later version leaves out."""
    try:
        return frozenset(store.read_versioned(withdrawn_key(dataset)).document["ids"])
    except MissingError:
        return frozenset()


def require_none_withdrawn(store: Store, dataset: str, sample_ids: Iterable[str]) -> None:
    """Raises `UserError` naming a record that was withdrawn."""
    for record in sorted({record_of(sample_id) for sample_id in sample_ids} & withdrawn_ids(store, dataset)):
        raise UserError(f"record {record!r} was withdrawn from dataset {dataset!r}: it does not come back")


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
    _note(store, dataset, wanted, reason)
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


def record_of(sample_id: str) -> str:
    """The id of the record that a sample was made of."""
    return sample_id.rpartition("#")[0]


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


def _note(store: Store, dataset: str, ids: frozenset[str], reason: str) -> None:
    """Add the ids, each with when and why; what is there stays as it is."""
    key = withdrawn_key(dataset)
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
    noted = dict.fromkeys(ids, about)
    for _ in range(100):
        store.create_versioned(key, {"format": FORMAT, "ids": {}})
        read = store.read_versioned(key)
        merged = {**noted, **read.document["ids"]}
        if store.replace_versioned(key, {**read.document, "ids": merged}, read=read):
            return
    raise InfrastructureError(f"{key} could not be updated: too many writers")
