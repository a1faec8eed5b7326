"""Collecting garbage: shards and receipts that no version names, and results of what is gone (docs/protocols.md,
"Collecting garbage")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from training.data.lease import LEASE_SECONDS, collecting
from training.data.manifest import load_manifest, shard_key
from training.data.versions import versions
from training.documents import read_document, unsealed
from training.errors import DamagedError, MissingError, UserError
from training.runs.record import RunRecord
from training.s3.objectstore import Store

MAX_AGE_HOURS = 87_600.0


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What was deleted, or would be."""

    keys: tuple[str, ...]
    num_bytes: int


def collect(
    store: Store,
    dataset: str,
    *,
    older_than_hours: float = 24.0,
    dry_run: bool = False,
    lease_seconds: float = LEASE_SECONDS,
) -> Garbage:
    """Delete a dataset's garbage that is older than a bound: the unfinished work of a writer that died is kept so long.

    Raises `UserError` if there is no such dataset, if the bound makes no sense, or if a writer or another collector is
    at work; a dry run disturbs nobody.
    """
    if not 0 <= older_than_hours <= MAX_AGE_HOURS:  # nor is nan
        raise UserError(f"older than {older_than_hours:g} hours: name 0 to {MAX_AGE_HOURS:g}")
    if dataset not in store.list_folders("datasets/"):
        raise UserError(f"no dataset {dataset!r}: see `unbroken data ls`")
    newest = datetime.now(UTC) - timedelta(hours=older_than_hours)
    of_runs = list(_results_of_removed_runs(store, newest))  # before the claim: no writer need wait for this
    if dry_run:
        return _sum_of([*_garbage(store, dataset, newest), *of_runs])
    with collecting(store, dataset, seconds=lease_seconds) as lease:
        doomed = list(_garbage(store, dataset, newest))
        for key, _ in doomed:
            lease.require_sure()
            store.delete_soon(key)
    for key, _ in of_runs:
        store.delete(key)
    return _sum_of([*doomed, *of_runs])


def _sum_of(doomed: list[tuple[str, int]]) -> Garbage:
    return Garbage(keys=tuple(key for key, _ in doomed), num_bytes=sum(num_bytes for _, num_bytes in doomed))


def _garbage(store: Store, dataset: str, newest: datetime) -> Iterator[tuple[str, int]]:
    """(key, bytes): receipts first, so that what is cut short leaves none that names a missing shard."""
    needed: set[str] = set()
    living = versions(store, dataset)
    for digest in living:
        manifest = load_manifest(store, dataset, digest)
        needed |= {shard_key(dataset, shard.sha256) for shards in manifest.splits.values() for shard in shards}
    for entry in list(store.list_entries(f"datasets/{dataset}/parts/")):
        if entry.modified <= newest and not _shards_of(store, dataset, entry.key) <= needed:
            yield entry.key, entry.num_bytes
    for entry in list(store.list_entries(f"datasets/{dataset}/shards/")):
        if entry.modified <= newest and entry.key not in needed:
            yield entry.key, entry.num_bytes
    for entry in list(store.list_entries(f"datasets/{dataset}/results/")):
        if entry.modified <= newest and _names_none_of(store, entry.key, living):
            yield entry.key, entry.num_bytes


def _shards_of(store: Store, dataset: str, receipt: str) -> set[str]:
    """The shards that a receipt names; a damaged one names nothing, and is written anew when it is needed."""
    try:
        splits = read_document(store.get(receipt), what=receipt)["receipt"]["splits"]
        return {shard_key(dataset, shard["sha256"]) for shards in splits.values() for shard in shards}
    except (DamagedError, MissingError, KeyError, TypeError, AttributeError):
        return set()


def _names_none_of(store: Store, result: str, digests: list[str]) -> bool:
    """Whether what sharding gave is gone. A damaged result is left alone too: it is found out, and then replaced."""
    try:
        return unsealed("result", store.get(result))["digest"] not in digests
    except (DamagedError, MissingError, KeyError, TypeError):
        return False


def _results_of_removed_runs(store: Store, newest: datetime) -> Iterator[tuple[str, int]]:
    """(key, bytes), of any dataset: whoever removed a run while it was evaluated could not see that result yet.

    They are listed before the record is looked for: what a run that was begun since then gives is not among them.
    """
    for key in store.list_folders("runs/"):
        results = [entry for entry in store.list_entries(f"runs/{key}/results/") if entry.modified <= newest]
        if results and not store.exists(RunRecord(store, key).object_key):
            yield from ((entry.key, entry.num_bytes) for entry in results)
