"""Collecting garbage: shards and receipts that no version names; and removing versions that nobody needs."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from training.data.lease import LEASE_SECONDS, collecting
from training.data.manifest import SPLITS, Manifest, ShardInfo, load_manifest, manifest_key, shard_key
from training.data.shard import decode_shard
from training.data.withdraw import runs_that_used
from training.documents import sha256_hex
from training.errors import UserError
from training.objectstore import MissingError, Store

NUM_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What was deleted, or would be."""

    keys: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A shard that is not as its version says."""

    key: str
    reason: str


def versions(store: Store, dataset: str) -> list[str]:
    """Digests of a dataset's versions, oldest first."""
    found = list(store.list_entries(f"datasets/{dataset}/manifests/"))
    newest_last = sorted(found, key=lambda entry: (entry.modified, entry.key))
    return [entry.key.rpartition("/")[2].removesuffix(".json") for entry in newest_last]


def find_version(store: Store, text: str) -> tuple[str, str]:
    """(dataset, digest) that a dataset's name (its newest version), a digest's beginning, or `NAME@BEGINNING` means.

    Raises `UserError` if that is none, or several.
    """
    name, _, beginning = text.partition("@") if "@" in text else (text, "", "")
    datasets = store.list_folders("datasets/")
    if name in datasets:
        found = [(name, digest) for digest in versions(store, name) if digest.startswith(beginning)]
        found = found if beginning else found[-1:]
    else:
        found = [(d, digest) for d in datasets for digest in versions(store, d) if digest.startswith(text)]
    if len(found) != 1 or not text:
        some = "no dataset version is" if not found else f"{len(found)} dataset versions are"
        raise UserError(f"{some} meant by {text!r}: name it as NAME@DIGEST (see `unbroken data ls`)")
    return found[0]


def verify_version(store: Store, dataset: str, digest: str) -> Iterator[Damage | None]:
    """For each shard of a version: its damage, or None if its bytes are what its name says."""
    manifest = load_manifest(store, dataset, digest)
    names = [shard.sha256 for shards in manifest.splits.values() for shard in shards]
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        yield from pool.map(lambda name: _damage_of(store, shard_key(dataset, name), name), names)


def _damage_of(store: Store, key: str, sha256: str) -> Damage | None:
    try:
        data = store.fetch(key)
    except MissingError:
        return Damage(key=key, reason="missing")
    return None if sha256_hex(data) == sha256 else Damage(key=key, reason="damaged")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one split differs from version A to version B."""

    split: str
    shards_shared: int
    shards_only_a: int
    shards_only_b: int
    bytes_only_a: int
    bytes_only_b: int
    samples_only_a: int
    samples_only_b: int


def compare(store: Store, a: tuple[str, Manifest], b: tuple[str, Manifest]) -> Iterator[Difference]:
    """For each split: what (name, manifest) A and B do not share. Samples go by their ids."""
    for split in SPLITS:
        shards_a, shards_b = set(a[1].splits[split]), set(b[1].splits[split])
        only_a, only_b = shards_a - shards_b, shards_b - shards_a
        ids_a, ids_b = _ids_in(store, a[0], only_a), _ids_in(store, b[0], only_b)
        yield Difference(
            split=split,
            shards_shared=len(shards_a & shards_b),
            shards_only_a=len(only_a),
            shards_only_b=len(only_b),
            bytes_only_a=sum(shard.num_bytes for shard in only_a),
            bytes_only_b=sum(shard.num_bytes for shard in only_b),
            samples_only_a=len(ids_a - ids_b),
            samples_only_b=len(ids_b - ids_a),
        )


def _ids_in(store: Store, dataset: str, shards: Collection[ShardInfo]) -> set[str]:
    found: set[str] = set()
    for info in shards:
        data = store.get_proven(shard_key(dataset, info.sha256), sha256=info.sha256)
        found.update(decode_shard(data, name=info.sha256).ids)
    return found


def remove_version(store: Store, dataset: str, digest: str) -> None:
    """Delete a version's manifest. Its shards are garbage then, if no other version has them.

    Raises `UserError` if a run was trained on it.
    """
    runs = runs_that_used(store, digest)
    if runs:
        raise UserError(
            f"dataset {dataset!r} version {digest[:12]} was used by run {runs[0][:12]}"
            + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
            + ": remove the run first (`unbroken runs rm`)"
        )
    store.delete(manifest_key(dataset, digest))


def collect(
    store: Store,
    dataset: str,
    *,
    older_than: timedelta = timedelta(days=1),
    dry_run: bool = False,
    lease_seconds: float = LEASE_SECONDS,
) -> Garbage:
    """Delete a dataset's garbage that is older than a bound: the unfinished work of a writer that died is kept so long.

    Raises `UserError` if a writer, or another collector, is at work.
    """
    with collecting(store, dataset, seconds=lease_seconds) as lease:
        doomed = list(_garbage(store, dataset, older_than))
        for key, _ in () if dry_run else doomed:
            lease.require_sure()
            store.delete(key)
    return Garbage(keys=tuple(key for key, _ in doomed), num_bytes=sum(num_bytes for _, num_bytes in doomed))


def _garbage(store: Store, dataset: str, older_than: timedelta) -> Iterator[tuple[str, int]]:
    """(key, bytes): receipts first, so that what is cut short leaves none that names a missing shard."""
    needed: set[str] = set()
    for digest in versions(store, dataset):
        manifest: Manifest = load_manifest(store, dataset, digest)
        needed |= {shard_key(dataset, shard.sha256) for shards in manifest.splits.values() for shard in shards}
    newest = datetime.now(UTC) - older_than
    for entry in list(store.list_entries(f"datasets/{dataset}/parts/")):
        if entry.modified <= newest and not _shards_of(store, dataset, entry.key) <= needed:
            yield entry.key, entry.num_bytes
    for entry in list(store.list_entries(f"datasets/{dataset}/shards/")):
        if entry.modified <= newest and entry.key not in needed:
            yield entry.key, entry.num_bytes


def _shards_of(store: Store, dataset: str, receipt: str) -> set[str]:
    """The shards that a receipt names; a damaged one names nothing, and is written anew when it is needed."""
    try:
        splits = json.loads(store.get(receipt))["receipt"]["splits"]
        return {shard_key(dataset, shard["sha256"]) for shards in splits.values() for shard in shards}
    except (ValueError, KeyError, TypeError, AttributeError):
        return set()
