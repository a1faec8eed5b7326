"""The list of records that every later version leaves out: by id, and by what is in them, wherever they lie by then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

import numpy as np
import xxhash

from training.errors import InfrastructureError, UserError
from training.objectstore import MissingError, Store
from training.recipe import Sample

FORMAT = 1
Withdrawn = Mapping[str, str]
"""Ids of records, and for each the digest of its samples."""


def withdrawn_key(dataset: str) -> str:
    return f"datasets/{dataset}/withdrawn.json"


def withdrawn_records(store: Store, dataset: str) -> dict[str, str]:
    """What every later version leaves out."""
    try:
        noted = store.read_versioned(withdrawn_key(dataset)).document["ids"]
    except MissingError:
        return {}
    return {record: about["content"] for record, about in noted.items()}


def record_of(sample_id: str) -> str:
    """The id of the record that a sample was made of."""
    return sample_id.rpartition("#")[0]


def content_of_samples(samples: Iterable[Sample]) -> str:
    """A digest of a record's samples that does not ask for their order: shards may part them."""
    total = 0
    for sample in samples:
        digest = xxhash.xxh3_128()
        for name in sorted(sample):
            array = np.asarray(sample[name])
            digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes())
        total += digest.intdigest() + 1
    return f"{total % (1 << 128):032x}"


def require_none_withdrawn(store: Store, dataset: str, sample_ids: Iterable[str]) -> None:
    """Raises `UserError` naming a record that was withdrawn."""
    for record in sorted({record_of(sample_id) for sample_id in sample_ids} & withdrawn_records(store, dataset).keys()):
        raise UserError(f"record {record!r} was withdrawn from dataset {dataset!r}: it does not come back")


def note_withdrawn(store: Store, dataset: str, records: Withdrawn, reason: str) -> None:
    """Add records, each with when and why; what is there stays as it is."""
    key = withdrawn_key(dataset)
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
    noted = {record: {**about, "content": content} for record, content in records.items()}
    for _ in range(100):
        store.create_versioned(key, {"format": FORMAT, "ids": {}})
        read = store.read_versioned(key)
        merged = {**noted, **read.document["ids"]}
        if store.replace_versioned(key, {**read.document, "ids": merged}, read=read):
            return
    raise InfrastructureError(f"{key} could not be updated: too many writers")
