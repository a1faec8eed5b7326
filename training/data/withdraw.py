"""Records taken out of a dataset: a new version without them, and a note so that they do not come back."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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
from training.data.shard import Column, Ragged, Shard, encode_shard
from training.data.versions import NUM_AT_ONCE, runs_that_used, versions
from training.data.withdrawn import (
    Withdrawn,
    contents_of,
    note_withdrawn,
    record_of,
    records_in,
    require_none_withdrawn_since,
    sample_at,
    sample_number,
    withdrawn_records,
)
from training.errors import UserError
from training.s3.objectstore import Store


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

    What the version lacks because it was withdrawn before is only told of again: who holds it, and who used it.
    Raises `UserError` naming an id that the version never held, before anything is written.
    """
    with writing(store, dataset) as lease:
        return _withdraw(store, dataset, digest, frozenset(record_ids), reason, lease)


def _withdraw(store: Store, dataset: str, digest: str, wanted: frozenset[str], reason: str, lease: Lease) -> Withdrawal:
    old = load_manifest(store, dataset, digest)
    records = _contents(store, dataset, old, wanted)
    noted = withdrawn_records(store, dataset)
    again = {record: noted[record] for record in wanted & noted.keys() - records.keys()}
    missing = wanted - records.keys() - again.keys()
    if missing:
        raise UserError(
            f"dataset {dataset!r} version {digest[:12]} holds no record {min(missing)!r}: a record's id is its place in"
            " the source, as in 'folder/file', 'file:line' or 'archive:name', without a sample's '#0'"
        )
    known = _merged(noted, records)
    doomed = _doomed(store, dataset, old, known)
    new = replace(old, splits={split: _splits_without(store, dataset, old, split, doomed) for split in SPLITS})
    if records:
        note_withdrawn(store, dataset, records, reason)
    if doomed:  # else it would become the newest version by being asked about
        publish(store, dataset, new, lease)
    require_none_withdrawn_since(store, dataset, known)
    numbers = _numbers(store, dataset, doomed) | _numbers_again(store, dataset, again)
    holding = _versions_holding(store, dataset, wanted, numbers)
    trained = tuple(digest for digest, splits in holding.items() if "train" in splits)
    return Withdrawal(
        old_digest=digest,
        new_digest=new.digest,
        num_samples_removed=sum(old.num_samples(split) - new.num_samples(split) for split in SPLITS),
        num_shards_rewritten=len(doomed),
        num_shards_shared=sum(len(shards) for shards in old.splits.values()) - len(doomed),
        versions_that_hold_them=tuple(holding),
        versions_that_train_on_them=trained,
        runs_that_used_them=runs_that_used(store, trained),
    )


Rows = set[int]
"""Rows of a shard that are to go."""


def _merged(first: Withdrawn, second: Withdrawn) -> dict[str, tuple[str, ...]]:
    return {key: tuple(sorted({*first.get(key, ()), *second.get(key, ())})) for key in {**first, **second}}


def _shards(store: Store, dataset: str, infos: Iterable[ShardInfo]) -> Iterator[Shard]:
    """Loaded one after another, the next ones being fetched meanwhile."""
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        waiting: deque[Future[Shard]] = deque()
        for info in infos:
            waiting.append(pool.submit(load_shard, store, dataset, info))
            if len(waiting) > NUM_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _contents(store: Store, dataset: str, manifest: Manifest, wanted: frozenset[str]) -> dict[str, tuple[str, ...]]:
    """The digest of each record's samples, of those that the version holds."""
    return {
        found.id: (found.content,)
        for split in SPLITS
        for found in records_in(_shards(store, dataset, manifest.splits[split]))
        if found.id in wanted
    }


def _doomed(store: Store, dataset: str, manifest: Manifest, withdrawn: Withdrawn) -> dict[ShardInfo, Rows]:
    """What a sharding of the same source would leave out now: by id, and by content."""
    contents = contents_of(withdrawn)
    doomed: dict[ShardInfo, Rows] = {}
    for split in SPLITS:
        shards = manifest.splits[split]
        for found in records_in(_shards(store, dataset, shards)):
            if found.id in withdrawn or found.content in contents:
                for number, row in found.places:
                    doomed.setdefault(shards[number], set()).add(row)
    return doomed


def _numbers(store: Store, dataset: str, doomed: Mapping[ShardInfo, Rows]) -> set[int]:
    """The digests of the samples that go."""
    return {
        sample_number(sample_at(shard, row))
        for info, shard in zip(doomed, _shards(store, dataset, doomed), strict=True)
        for row in doomed[info]
    }


def _numbers_again(store: Store, dataset: str, again: Withdrawn) -> set[int]:
    """The digests of samples withdrawn before: of what was noted, where a version holds it under its id still; and a
    single sample's, which is its record's.
    """
    if not again:
        return set()
    infos = _infos(_manifests(store, dataset))
    found = records_in(_shards(store, dataset, infos))
    places = [place for one in found if one.content in again.get(one.id, ()) for place in one.places]
    rows = (sample_at(load_shard(store, dataset, infos[number]), row) for number, row in places)
    return {int(content, 16) for content in contents_of(again)} | {sample_number(row) for row in rows}


def _manifests(store: Store, dataset: str) -> dict[str, Manifest]:
    return {digest: load_manifest(store, dataset, digest) for digest in versions(store, dataset)}


def _infos(manifests: Mapping[str, Manifest]) -> list[ShardInfo]:
    """Each shard once, however many versions share it."""
    return list(dict.fromkeys(info for m in manifests.values() for split in SPLITS for info in m.splits[split]))


def _versions_holding(
    store: Store, dataset: str, records: Collection[str], numbers: Collection[int]
) -> dict[str, set[Split]]:
    """Every version with one of these records, or of these samples under another id, and the splits it has them in."""
    manifests = _manifests(store, dataset)
    infos = _infos(manifests)
    found = {
        info
        for info, shard in zip(infos, _shards(store, dataset, infos), strict=True)
        if any(
            record_of(shard.id_of(row)) in records or sample_number(sample_at(shard, row)) in numbers
            for row in range(len(shard))
        )
    }
    holding = {
        digest: {split for split in SPLITS if not found.isdisjoint(manifest.splits[split])}
        for digest, manifest in manifests.items()
    }
    return {digest: splits for digest, splits in holding.items() if splits}


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
