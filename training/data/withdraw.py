"""Records taken out of a dataset: a list of ids that grows, and a new version without them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np

from training.data.lease import Lease, writing
from training.data.manifest import SPLITS, Manifest, ShardInfo, Split, load_manifest, manifest_key, shard_key
from training.data.shard import Column, Ragged, Shard, decode_shard, encode_shard
from training.documents import fast_digest, sha256_hex
from training.errors import InfrastructureError, UserError
from training.job import read_jobs
from training.objectstore import MissingError, Store

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """What was done to take records out of a version."""

    old_digest: str
    new_digest: str
    num_samples_removed: int
    num_shards_rewritten: int
    num_shards_shared: int
    runs_that_used_it: tuple[str, ...]
    """Runs that trained on the old version, if the records were in its train split."""


def withdrawn_key(dataset: str) -> str:
    return f"datasets/{dataset}/withdrawn.json"


def withdrawn_ids(store: Store, dataset: str) -> frozenset[str]:
    """Ids of the records that every later version leaves out."""
    try:
        return frozenset(store.read_versioned(withdrawn_key(dataset)).document["ids"])
    except MissingError:
        return frozenset()


def withdraw(store: Store, dataset: str, digest: str, record_ids: Collection[str]) -> Withdrawal:
    """Make a version without these records, and have every later sharding of the source leave them out too.

    Raises `UserError` naming an id that the version does not hold, before anything is written.
    """
    with writing(store, dataset) as lease:
        return _withdraw(store, dataset, digest, frozenset(record_ids), lease)


def _withdraw(store: Store, dataset: str, digest: str, wanted: frozenset[str], lease: Lease) -> Withdrawal:
    manifest = load_manifest(store, dataset, digest)
    found = {split: list(_rows_of(store, dataset, manifest, split, wanted)) for split in SPLITS}
    missing = wanted - {record for rows in found.values() for _, _, records in rows for record in records}
    if missing:
        raise UserError(f"dataset {dataset!r} version {digest[:12]} holds no record {min(missing)!r}")
    splits: dict[Split, tuple[ShardInfo, ...]] = {}
    for split in SPLITS:
        changed = {number: rows for number, rows, _ in found[split]}
        shards = manifest.splits[split]
        kept = [_without(store, dataset, s, changed[n]) if n in changed else s for n, s in enumerate(shards)]
        splits[split] = tuple(shard for shard in kept if shard is not None)
        if not splits[split]:
            raise UserError(f"without these records dataset {dataset!r} has no sample in its {split} split")
    new = replace(manifest, splits=splits)
    _note(store, dataset, wanted)
    lease.require_sure()
    store.put_immutable(manifest_key(dataset, new.digest), new.to_bytes())
    num_rewritten = sum(len(rows) for rows in found.values())
    return Withdrawal(
        old_digest=digest,
        new_digest=new.digest,
        num_samples_removed=sum(len(rows) for split in SPLITS for _, rows, _ in found[split]),
        num_shards_rewritten=num_rewritten,
        num_shards_shared=sum(len(shards) for shards in manifest.splits.values()) - num_rewritten,
        runs_that_used_it=runs_that_used(store, digest) if found["train"] else (),
    )


def runs_that_used(store: Store, dataset_digest: str) -> tuple[str, ...]:
    """Keys of the runs that were submitted on a dataset version."""
    keys = store.list_folders("runs/")
    return tuple(key for key in keys if any(job.dataset_digest == dataset_digest for job in read_jobs(store, key)))


def record_of(sample_id: str) -> str:
    """The id of the record that a sample was made of."""
    return sample_id.rpartition("#")[0]


def _rows_of(
    store: Store, dataset: str, manifest: Manifest, split: Split, wanted: Collection[str]
) -> Iterator[tuple[int, list[int], set[str]]]:
    """(shard number, rows, records) wherever a shard holds one of the records."""
    for number, info in enumerate(manifest.splits[split]):
        ids = [record_of(sample_id) for sample_id in _load(store, dataset, info).ids]
        rows = [row for row, record in enumerate(ids) if record in wanted]
        if rows:
            yield number, rows, {ids[row] for row in rows}


def _load(store: Store, dataset: str, info: ShardInfo) -> Shard:
    return decode_shard(store.get_proven(shard_key(dataset, info.sha256), sha256=info.sha256), name=info.sha256)


def _without(store: Store, dataset: str, info: ShardInfo, rows: Collection[int]) -> ShardInfo | None:
    """The shard without some rows; None if nothing is left."""
    shard = _load(store, dataset, info)
    kept = [row for row in range(len(shard)) if row not in set(rows)]
    if not kept:
        return None
    columns = {name: _take(column, kept) for name, column in shard.columns.items()}
    data = encode_shard([shard.id_of(row) for row in kept], columns)
    new = ShardInfo(sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=len(kept), num_bytes=len(data))
    store.put_immutable(shard_key(dataset, new.sha256), data)
    return new


def _take(column: Column, rows: list[int]) -> Column:
    if isinstance(column, Ragged):
        return Ragged.stack([column[row] for row in rows])
    return np.take(column, rows, axis=0)


def _note(store: Store, dataset: str, ids: frozenset[str]) -> None:
    key = withdrawn_key(dataset)
    for _ in range(100):
        store.create_versioned(key, {"format": FORMAT, "ids": []})
        read = store.read_versioned(key)
        merged = sorted(ids | set(read.document["ids"]))
        if store.replace_versioned(key, {**read.document, "ids": merged}, read=read):
            return
    raise InfrastructureError(f"{key} could not be updated: too many writers")
