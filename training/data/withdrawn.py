"""The list of records that every later version leaves out: by id, and by what is in them, wherever they lie by then."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

import numpy as np
import xxhash

from training.data.shard import Shard
from training.documents import parse
from training.errors import DamagedError, InfrastructureError, MissingError, UserError
from training.recipe import Sample, Table
from training.s3.objectstore import Store

FORMAT = 1
QUARANTINED = "quarantined: "
"""How the reason begins if a run went on without a record that made it fail."""
Withdrawn = Mapping[str, Collection[str]]
"""Ids of records, and for each the digests of what was withdrawn under it."""


@dataclass(frozen=True, kw_only=True)
class FoundRecord:
    """A record put together again from its samples, which may lie in several shards."""

    id: str
    content: str
    """A digest of its samples that does not ask for their order."""
    places: tuple[tuple[int, int], ...]
    """(number of the shard, row) of each sample."""


@dataclass(frozen=True, kw_only=True)
class _Noted:
    """What is known of a withdrawn record."""

    contents: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _List:
    """The document."""

    ids: dict[str, _Noted]


def withdrawn_key(dataset: str) -> str:
    return f"datasets/{dataset}/withdrawn.json"


def withdrawn_records(store: Store, dataset: str) -> dict[str, tuple[str, ...]]:
    """What every later version leaves out. Raises `DamagedError` naming the document if it is not one."""
    return {record: about.contents for record, about in _noted(store, dataset).items()}


def quarantined_records(store: Store, dataset: str) -> list[str]:
    """Those of the withdrawn ones that a run went on without."""
    noted = _noted(store, dataset)
    return sorted(record for record, about in noted.items() if about.reason.startswith(QUARANTINED))


def _noted(store: Store, dataset: str) -> dict[str, _Noted]:
    key = withdrawn_key(dataset)
    try:
        return parse(_List, store.read_versioned(key).document).ids
    except MissingError:
        return {}
    except DamagedError as error:
        raise DamagedError(f"{store.location.uri(key)} lists no withdrawn records: {error}") from error


def contents_of(withdrawn: Withdrawn) -> frozenset[str]:
    return frozenset(content for contents in withdrawn.values() for content in contents)


def record_of(sample_id: str) -> str:
    """The id of the record that a sample was made of."""
    return sample_id.rpartition("#")[0]


def content_of_samples(given: Iterable[Sample | Table]) -> str:
    """A digest of a record's samples that asks neither for their order nor whether they came as tables."""
    return _content(sum(sample_number(row) for one in given for row in (one if isinstance(one, Table) else (one,))))


def sample_at(shard: Shard, row: int) -> Sample:
    return {name: column[row] for name, column in shard.columns.items()}


def sample_number(sample: Sample) -> int:
    """A digest of one sample: its fields' names, dtypes, shapes and bytes."""
    digest = xxhash.xxh3_128()
    for name in sorted(sample):
        array = np.asarray(sample[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes())
    return digest.intdigest() + 1


def _content(total: int) -> str:
    return f"{total % (1 << 128):032x}"


def records_in(shards: Iterable[Shard]) -> Iterator[FoundRecord]:
    """The records of a split, in order, from its shards: the samples of one record are neighbours."""
    rows = ((number, row, shard) for number, shard in enumerate(shards) for row in range(len(shard)))
    for record, group in groupby(rows, key=lambda found: record_of(found[2].id_of(found[1]))):
        total, places = 0, []
        for number, row, shard in group:
            total += sample_number(sample_at(shard, row))
            places.append((number, row))
        yield FoundRecord(id=record, content=_content(total), places=tuple(places))


def require_none_withdrawn(dataset: str, shards: Iterable[Shard], withdrawn: Withdrawn) -> None:
    """Raises `UserError` naming a record of a split that was withdrawn, or what was withdrawn under another id."""
    contents = contents_of(withdrawn)
    for found in records_in(shards) if withdrawn else ():
        if found.id in withdrawn or found.content in contents:
            raise UserError(f"record {found.id!r} was withdrawn from dataset {dataset!r}: it does not come back")


def require_none_withdrawn_since(store: Store, dataset: str, known: Withdrawn) -> None:
    """After a version was published without what was `known` to be withdrawn. Raises `InfrastructureError`."""
    now = withdrawn_records(store, dataset)
    if now.keys() - known.keys() or contents_of(now) - contents_of(known):
        raise InfrastructureError(f"dataset {dataset!r}: records were withdrawn meanwhile: run it again")


def note_withdrawn(store: Store, dataset: str, records: Withdrawn, reason: str) -> None:
    """Add records, each with when and why; what is there stays, and gets what is new under its id."""
    key = withdrawn_key(dataset)
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
    for _ in range(100):
        store.create_versioned(key, {"format": FORMAT, "ids": {}})
        read = store.read_versioned(key)
        there = read.document["ids"]
        merged = dict(there)
        for record, contents in records.items():
            old = there.get(record, {**about, "contents": []})
            merged[record] = {**old, "contents": sorted({*old["contents"], *contents})}
        if store.replace_versioned(key, {**read.document, "ids": merged}, read=read):
            return
    raise InfrastructureError(f"{key} could not be updated: too many writers")
