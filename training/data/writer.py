"""Partitions to shards, receipts and the manifest, in this order; so a killed writer is simply run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from training.config import DataConfig
from training.data.manifest import (
    SPLITS,
    FieldInfo,
    Manifest,
    ShardInfo,
    Split,
    manifest_key,
    receipt_key,
    shard_key,
)
from training.data.shard import FORMAT, Array, Column, Ragged, dtype_is_known, encode_shard
from training.data.source import Partition, Source, partition_fingerprint, partitions, read_records
from training.documents import canonical_json, digest_of, fast_digest, parse, sha256_hex
from training.errors import DamagedError, UserError
from training.objectstore import MissingError, Store
from training.recipe import Recipe, Record, Sample, source_closure_digest

Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one finished partition gave."""

    fields: dict[str, FieldInfo]
    splits: dict[Split, tuple[ShardInfo, ...]]


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """The dataset version, and how much of it had to be made."""

    manifest: Manifest
    num_partitions: int
    num_partitions_reused: int
    num_shards_sent: int


def split_of(record: Record, test_percent: int) -> Split:
    """Which split a record belongs to: a hash of its bytes decides, so equal records never part."""
    bucket = int.from_bytes(hashlib.sha256(record.data).digest()[:8], "big") % 100
    return "test" if bucket < test_percent else "train"


def write_dataset(
    store: Store, source: Source, config: DataConfig, recipe: Recipe, *, report: Report | None = None
) -> WriteResult:
    """Shard a whole source. Raises `UserError` naming the file and position of a record that cannot be read."""
    parts = partitions(source, config)
    writer = _Writer(store=store, source=source, config=config, recipe=recipe)
    receipts: list[Receipt] = []
    for number, part in enumerate(parts, start=1):
        receipts.append(writer.receipt_of(part))
        if report:
            report(number, len(parts))
    manifest = _merge(receipts, config)
    store.put_immutable(manifest_key(config.name, manifest.digest), manifest.to_bytes())
    return WriteResult(
        manifest=manifest,
        num_partitions=len(parts),
        num_partitions_reused=writer.num_reused,
        num_shards_sent=writer.num_shards_sent,
    )


def _merge(receipts: Sequence[Receipt], config: DataConfig) -> Manifest:
    fields = next((receipt.fields for receipt in receipts if receipt.fields), {})
    for receipt in receipts:
        if receipt.fields and receipt.fields != fields:
            raise UserError(f"the samples' fields differ between files: {fields} and {receipt.fields}")
    splits = {split: tuple(shard for r in receipts for shard in r.splits[split]) for split in SPLITS}
    for split, shards in splits.items():
        if not shards:
            raise UserError(
                f"data.source = {config.source!r} gives no sample for the {split} split: it is too small for"
                f" data.test_percent = {config.test_percent}, or the recipe's encode() yields nothing"
            )
    return Manifest(fields=fields, splits=splits)


@dataclass(kw_only=True)
class _Writer:
    store: Store
    source: Source
    config: DataConfig
    recipe: Recipe
    num_reused: int = 0
    num_shards_sent: int = 0
    _encoding: str = field(init=False)

    def __post_init__(self) -> None:
        self._encoding = digest_of(
            {
                "format": FORMAT,
                "recipe": source_closure_digest(self.recipe),
                "hyperparameters": asdict(self.recipe),
                "record_format": self.config.format,
                "test_percent": self.config.test_percent,
                "shard_bytes": self.config.shard_bytes,
            }
        )

    def receipt_of(self, part: Partition) -> Receipt:
        """The receipt of a partition: found if it is finished and its shards are whole, else made."""
        key = receipt_key(self.config.name, partition_fingerprint(self.source, part, encoding=self._encoding))
        receipt = self._find(key)
        if receipt is not None:
            self.num_reused += 1
            return receipt
        receipt = self._write(part)
        self.store.put_immutable(key, _sealed(asdict(receipt)))
        return receipt

    def _find(self, key: str) -> Receipt | None:
        try:
            receipt = parse(Receipt, _unsealed(self.store.get(key)))
        except (MissingError, DamagedError):
            return None
        shards = [shard for split in SPLITS for shard in receipt.splits[split]]
        return receipt if all(self._is_whole(shard) for shard in shards) else None

    def _is_whole(self, shard: ShardInfo) -> bool:
        try:
            return sha256_hex(self.store.get(shard_key(self.config.name, shard.sha256))) == shard.sha256
        except MissingError:
            return False

    def _write(self, part: Partition) -> Receipt:
        fields: dict[str, FieldInfo] = {}
        builders = {split: _ShardBuilder(self.config.shard_bytes, fields, self.recipe.ragged) for split in SPLITS}
        shards: dict[Split, list[ShardInfo]] = {split: [] for split in SPLITS}
        for record in read_records(self.source, part, self.config):
            split = split_of(record, self.config.test_percent)
            for number, sample in enumerate(_encode(self.recipe, record)):
                builders[split].add(f"{record.id}#{number}", sample)
                if builders[split].is_full:
                    shards[split].append(self._send(builders[split]))
        for split in SPLITS:
            if builders[split].ids:
                shards[split].append(self._send(builders[split]))
        return Receipt(fields=fields, splits={split: tuple(shards[split]) for split in SPLITS})

    def _send(self, builder: _ShardBuilder) -> ShardInfo:
        info, data = builder.take()
        self.num_shards_sent += self.store.put_immutable(shard_key(self.config.name, info.sha256), data)
        return info


def _sealed(document: dict[str, Any]) -> bytes:
    """A document with its own digest: a receipt's name says what went in, not what came out."""
    return canonical_json({"receipt": document, "sha256": digest_of(document)})


def _unsealed(data: bytes) -> dict[str, Any]:
    try:
        sealed = json.loads(data)
        document: dict[str, Any] = sealed["receipt"]
        if digest_of(document) == sealed["sha256"]:
            return document
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedError("a receipt is damaged")


def _encode(recipe: Recipe, record: Record) -> Iterator[Sample]:
    try:
        yield from recipe.encode(record)
    except UserError:
        raise
    except Exception as error:  # the recipe's own code: whatever it raises, the record is the place to look
        raise UserError(f"cannot read record {record.id}: {type(error).__name__}: {error}") from error


class _ShardBuilder:
    """Collects samples until they fill a shard. Boundaries depend on the samples alone."""

    def __init__(self, shard_bytes: int, fields: dict[str, FieldInfo], ragged: Collection[str]) -> None:
        """`fields` is shared by a partition's builders, and filled from the first sample."""
        self._shard_bytes = shard_bytes
        self._ragged = ragged
        self._num_bytes = 0
        self._samples: list[Sample] = []
        self.ids: list[str] = []
        self.fields = fields

    @property
    def is_full(self) -> bool:
        return self._num_bytes >= self._shard_bytes

    def add(self, sample_id: str, sample: Sample) -> None:
        fields = {name: self._declared(sample_id, name, array) for name, array in sample.items()}
        if not self.fields:
            self.fields.update(fields)
        if fields != self.fields:
            raise UserError(f"record {sample_id}: its fields are {fields}, where those before had {self.fields}")
        self.ids.append(sample_id)
        self._samples.append(sample)
        self._num_bytes += sum(array.nbytes for array in sample.values()) + len(sample_id)

    def _declared(self, sample_id: str, name: str, array: Array) -> FieldInfo:
        if not dtype_is_known(array.dtype):
            raise UserError(f"record {sample_id}: field {name!r} has dtype {array.dtype}")
        if not name or "." in name:
            raise UserError(f"record {sample_id}: field {name!r} must have a name without a dot")
        if name not in self._ragged:
            return FieldInfo(dtype=array.dtype.name, shape=array.shape)
        if array.ndim == 0:
            raise UserError(f"record {sample_id}: field {name!r} is in the recipe's `ragged`, but has no length")
        return FieldInfo(dtype=array.dtype.name, shape=(None, *array.shape[1:]))

    def take(self) -> tuple[ShardInfo, bytes]:
        columns: dict[str, Column] = {}
        for name in self.fields:
            rows = [sample[name] for sample in self._samples]
            columns[name] = Ragged.stack(rows) if name in self._ragged else np.stack(rows)
        data = encode_shard(self.ids, columns)
        info = ShardInfo(
            sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=len(self.ids), num_bytes=len(data)
        )
        self._samples, self.ids, self._num_bytes = [], [], 0
        return info, data
