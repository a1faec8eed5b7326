"""A dataset's versions: found by name, compared, proven, removed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

from training.data.activity import distrust, read_activity
from training.data.lease import writing
from training.data.manifest import SPLITS, Manifest, ShardInfo, load_manifest, load_shard, manifest_key, shard_key
from training.data.withdrawn import sample_at, sample_number
from training.documents import sha256_hex
from training.errors import DamagedError, MissingError, UserError
from training.runs.job import read_jobs
from training.s3.objectstore import Store

NUM_AT_ONCE = 4
_IS_MANIFEST = re.compile(r"[0-9a-f]{64}\.json")


def versions(store: Store, dataset: str) -> list[str]:
    """Digests of a dataset's versions; the one that was sharded last comes last."""
    return list(versions_by_time(store, dataset))


def versions_by_time(store: Store, dataset: str) -> dict[str, datetime]:
    """The same, and when each was last sharded or imported."""
    prefix = f"datasets/{dataset}/manifests/"
    found = [entry for entry in store.list_entries(prefix) if _IS_MANIFEST.fullmatch(entry.key.removeprefix(prefix))]
    noted = manifest_key(dataset, _noted_last(store, dataset))
    newest_last = sorted(found, key=lambda e: (e.key == noted, e.modified, e.key))
    return {entry.key.removeprefix(prefix).removesuffix(".json"): entry.modified for entry in newest_last}


def _noted_last(store: Store, dataset: str) -> str:
    """What the times cannot tell: they have whole seconds, and are those of the copying once a bucket was copied.

    A damaged note stops whoever shards, and names its cure there; who only looks goes by the times.
    """
    with suppress(DamagedError):
        return read_activity(store, dataset).newest
    return ""


def find_version(store: Store, text: str) -> tuple[str, str]:
    """(dataset, digest) that a dataset's name, a digest's beginning, or `NAME@BEGINNING` means.

    A name means the version that was sharded last, of those whose manifest is whole.

    Raises `UserError` if that is none, or several.
    """
    if not text:
        raise UserError("name a dataset, or one of its versions as NAME@DIGEST (see `unbroken data ls`)")
    name, _, beginning = text.partition("@") if "@" in text else (text, "", "")
    datasets = store.list_folders("datasets/")
    if name in datasets:
        found = [(name, digest) for digest in versions(store, name) if digest.startswith(beginning)]
        found = found if beginning else _last_whole(store, found)
    else:
        found = [(d, digest) for d in datasets for digest in versions(store, d) if digest.startswith(text)]
    if len(found) != 1:
        some = "no dataset version is" if not found else f"{len(found)} dataset versions are"
        raise UserError(f"{some} meant by {text!r}: name it as NAME@DIGEST (see `unbroken data ls`)")
    return found[0]


def _last_whole(store: Store, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    for name, digest in reversed(found):
        with suppress(DamagedError):
            load_manifest(store, name, digest)
            return [(name, digest)]
    return found[-1:]


def runs_that_used(store: Store, digests: Collection[str]) -> tuple[str, ...]:
    """Keys of the runs that were submitted on one of these dataset versions."""
    keys = store.list_folders("runs/")
    return tuple(key for key in keys if any(job.dataset_digest in digests for job in read_jobs(store, key)))


def remove_version(store: Store, dataset: str, digest: str) -> None:
    """Delete a version's manifest. Its shards are garbage then, if no other version has them.

    Raises `UserError` if a run was trained on it.
    """
    with writing(store, dataset):  # a collector would stumble over a manifest that it listed and cannot read
        runs = runs_that_used(store, [digest])
        if runs:
            raise UserError(
                f"dataset {dataset!r} version {digest[:12]} was used by run {runs[0][:12]}"
                + (f" and {len(runs) - 1} more" if len(runs) > 1 else "")
                + ": remove the run first (`unbroken runs rm`)"
            )
        distrust(store, dataset)
        store.delete(manifest_key(dataset, digest))


# ---- proving ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A shard that is not as its version says."""

    key: str
    reason: str


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


# ---- comparing -------------------------------------------------------------------------------------------------------


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
    samples_changed: int
    """In both under one id, but not the same."""


def compare(store: Store, a: tuple[str, Manifest], b: tuple[str, Manifest]) -> Iterator[Difference]:
    """For each split: what (name, manifest) A and B do not share. Samples go by their ids."""
    for split in SPLITS:
        shards_a, shards_b = set(a[1].splits[split]), set(b[1].splits[split])
        only_a, only_b = shards_a - shards_b, shards_b - shards_a
        samples_a, samples_b = _samples_in(store, a[0], only_a), _samples_in(store, b[0], only_b)
        yield Difference(
            split=split,
            shards_shared=len(shards_a & shards_b),
            shards_only_a=len(only_a),
            shards_only_b=len(only_b),
            bytes_only_a=sum(shard.num_bytes for shard in only_a),
            bytes_only_b=sum(shard.num_bytes for shard in only_b),
            samples_only_a=len(samples_a.keys() - samples_b.keys()),
            samples_only_b=len(samples_b.keys() - samples_a.keys()),
            samples_changed=sum(samples_a[one] != samples_b[one] for one in samples_a.keys() & samples_b.keys()),
        )


def _samples_in(store: Store, dataset: str, shards: Collection[ShardInfo]) -> dict[str, int]:
    """A digest of each sample, by its id."""

    def read(info: ShardInfo) -> dict[str, int]:
        shard = load_shard(store, dataset, info)
        return {shard.id_of(row): sample_number(sample_at(shard, row)) for row in range(len(shard))}

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return {one: number for found in pool.map(read, shards) for one, number in found.items()}
