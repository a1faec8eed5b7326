"""Partitions to shards, receipts and the manifest, in this order; so a killed writer is simply run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from training.config import DataConfig
from training.data.lease import Lease, publish, writing
from training.data.manifest import (
    SPLITS,
    FieldInfo,
    Manifest,
    ShardInfo,
    Split,
    describe_shard,
    load_shard,
    receipt_key,
    shard_key,
)
from training.data.shard import (
    FORMAT,
    Array,
    Column,
    Ragged,
    dtype_is_known,
    id_column,
    num_digits,
    numbered_ids,
    shard_pieces,
)
from training.data.source import (
    Partition,
    Source,
    classes_of,
    content_digests,
    content_of,
    partition_fingerprint,
    partitions,
    read_records,
)
from training.data.withdrawn import (
    Withdrawn,
    content_of_samples,
    contents_of,
    records_in,
    require_none_withdrawn_since,
)
from training.documents import canonical_json, digest_of, parse, sha256_hex
from training.errors import DamagedError, UserError
from training.objectstore import MissingError, Store
from training.recipe import Recipe, Record, Sample, Table, source_closure_digest


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What one finished partition gave."""

    fields: dict[str, FieldInfo]
    splits: dict[Split, tuple[ShardInfo, ...]]
    displaced: tuple[str, ...] = ()
    """Records left out by their id, whose content is not what was withdrawn under it: the source has changed since."""


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """A finished partition: where its receipt lies, and how much had to be done for it."""

    receipt: str
    num_bytes: int
    is_reused: bool
    num_shards_sent: int


@dataclass(frozen=True, kw_only=True)
class WriteResult:
    """The dataset version, and how much of it had to be made."""

    manifest: Manifest
    num_partitions: int
    num_partitions_reused: int
    num_shards_sent: int
    displaced: tuple[str, ...]
    """See `Receipt.displaced`."""


Given = Sample | Table
"""What a recipe's `encode` gives."""
Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[PartResult], None]
ARRAYS = (np.ndarray, np.generic)
MAPPINGS = (dict, Mapping)  # a dict is known sooner as such
WHOLE_FILES = ("files", "folders")
"""Formats whose records are files: a file's digest is its record's."""


def split_of(record: Record, test_percent: int, *, sha256: str | None = None) -> Split:
    """Which split a record belongs to: the sha256 of its bytes decides, so equal records never part."""
    bucket = int((sha256 or sha256_hex(content_of(record)))[:16], 16) % 100
    return "test" if bucket < test_percent else "train"


def write_dataset(
    store: Store,
    source: Source,
    config: DataConfig,
    recipe: Recipe,
    *,
    withdrawn: Withdrawn = MappingProxyType({}),
    report: Report | None = None,
) -> WriteResult:
    """Shard a whole source in this thread. Raises `UserError` naming the file and position of an unreadable record."""
    writer = Writer(store, source, config, recipe, withdrawn=withdrawn)
    with writing(store, config.name) as lease:
        results: list[PartResult] = []
        for part in writer.parts:
            results.append(writer.write(part))
            if report:
                report(results[-1])
        return writer.finish(results, lease)


class Writer:
    """Shards one source. `write` may be called for its `parts` in any order, by many threads or processes at once;
    `finish` makes the manifest of them all.

    Whatever dies, a new writer of the same source finds what is finished.
    """

    def __init__(
        self,
        store: Store,
        source: Source,
        config: DataConfig,
        recipe: Recipe,
        *,
        withdrawn: Withdrawn = MappingProxyType({}),
    ) -> None:
        """`withdrawn` records are left out, by id and by content. Raises `UserError` if the source holds nothing."""
        self.parts = partitions(source, config)
        self._classes = classes_of(self.parts) if config.format == "folders" else ()
        self._store = store
        self._source = source
        self._config = config
        self._recipe = recipe
        self._withdrawn = dict(withdrawn)
        self._withdrawn_contents = contents_of(withdrawn)
        encoding = {
            "format": FORMAT,
            "recipe": source_closure_digest(recipe),
            "hyperparameters": asdict(recipe),
            "record_format": config.format,
            "test_percent": config.test_percent,
            "shard_bytes": config.shard_bytes,
        }
        self._encoding = digest_of({**encoding, **({"classes": self._classes} if self._classes else {})})

    def write(self, part: Partition) -> PartResult:
        """Shard a partition and leave its receipt; nothing is done if it is finished and its shards are whole."""
        digests = content_digests(self._source, part)
        fingerprint = partition_fingerprint(digests, encoding=self._encoding, withdrawn=self._withdrawn)
        key = receipt_key(self._config.name, fingerprint)
        is_reused = self._is_finished(key)
        num_sent = 0
        if not is_reused:
            receipt, num_sent = self._write(part, digests if self._config.format in WHOLE_FILES else {})
            for file in part.files:  # or the receipt would say that other bytes gave these shards
                self._source.require_unchanged(file)
            self._store.put_immutable(key, _sealed(asdict(receipt)))
        return PartResult(receipt=key, num_bytes=part.num_bytes, is_reused=is_reused, num_shards_sent=num_sent)

    def finish(self, results: Sequence[PartResult], lease: Lease) -> WriteResult:
        """The manifest of the partitions' results, given in their order.

        Raises `UserError` if they do not fit together, `InfrastructureError` if that must be found out again: the
        `lease` lapsed once more, or records were withdrawn since they were read.
        """
        if not lease.is_sure:  # away for so long that a collector may have taken shards
            lease.enter_again()
            results = [self.write(part) for part in self.parts]
        receipts = [parse(Receipt, _unsealed(self._store.get(result.receipt))) for result in results]
        manifest = _merge(receipts, self._config, self._classes)
        publish(self._store, self._config.name, manifest, lease)
        require_none_withdrawn_since(self._store, self._config.name, self._withdrawn)
        return WriteResult(
            manifest=manifest,
            num_partitions=len(results),
            num_partitions_reused=sum(result.is_reused for result in results),
            num_shards_sent=sum(result.num_shards_sent for result in results),
            displaced=tuple(record for receipt in receipts for record in receipt.displaced),
        )

    def _is_finished(self, receipt: str) -> bool:
        try:
            found = parse(Receipt, _unsealed(self._store.get(receipt)))
            return all(self._is_whole(found.splits[split]) for split in SPLITS)
        except (MissingError, DamagedError):
            return False

    def _is_whole(self, shards: Sequence[ShardInfo]) -> bool:
        """Whether the shards are what their names say, and hold nothing that was withdrawn elsewhere since.

        Raises `MissingError` or `DamagedError` if they are not.
        """
        loaded = (load_shard(self._store, self._config.name, shard) for shard in shards)
        if self._withdrawn_contents:
            return all(record.content not in self._withdrawn_contents for record in records_in(loaded))
        return all(len(shard) for shard in loaded)

    def _write(self, part: Partition, digests: Mapping[str, str]) -> tuple[Receipt, int]:
        """`digests` are those of records, where they are known already."""
        fields: dict[str, FieldInfo] = {}
        builders = {s: _ShardBuilder(s, self._config.shard_bytes, fields, self._recipe.ragged) for s in SPLITS}
        shards: dict[Split, list[ShardInfo]] = {split: [] for split in SPLITS}
        num_sent = 0
        displaced: list[str] = []
        for split, info, is_new in _one_behind(self._send, self._full(part, builders, digests, displaced)):
            shards[split].append(info)
            num_sent += is_new
        splits = {split: tuple(shards[split]) for split in SPLITS}
        return Receipt(fields=fields, splits=splits, displaced=tuple(displaced)), num_sent

    def _send(self, full: _Full) -> tuple[Split, ShardInfo, bool]:
        pieces = shard_pieces(full.ids, full.columns)
        info = describe_shard(*pieces, num_samples=len(full.ids))
        is_new = self._store.put_immutable(shard_key(self._config.name, info.sha256), *pieces, sha256=info.sha256)
        return full.split, info, is_new

    def _full(
        self,
        part: Partition,
        builders: Mapping[Split, _ShardBuilder],
        digests: Mapping[str, str],
        displaced: list[str],
    ) -> Iterator[_Full]:
        """The partition's samples by full shards, and at the end what is left."""
        for record in read_records(self._source, part, self._config, self._classes):
            samples = _encode(self._recipe, record)
            if self._withdrawn:
                samples = iter(self._unless_withdrawn(record.id, [*map(_kept, samples)], displaced))
            builder = builders[split_of(record, self._config.test_percent, sha256=digests.get(record.id))]
            yield from builder.add(record.id, samples)
        yield from (builder.take() for builder in builders.values() if not builder.is_empty)

    def _unless_withdrawn(self, record: str, samples: list[Given], displaced: list[str]) -> list[Given]:
        """None of them if their record is withdrawn: by its id, or by what is in it, wherever it lies by now."""
        content = content_of_samples(samples)
        if content in self._withdrawn_contents:
            return []
        if record in self._withdrawn:
            displaced.append(record)
            return []
        return samples


def _merge(receipts: Sequence[Receipt], config: DataConfig, classes: tuple[str, ...]) -> Manifest:
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
    return Manifest(fields=fields, splits=splits, classes=classes)


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


def _encode(recipe: Recipe, record: Record) -> Iterator[Given]:
    try:
        given = recipe.encode(record)
        yield from (given,) if isinstance(given, Table) else given
    except UserError:
        raise
    except Exception as error:  # the recipe's own code: whatever it raises, the record is the place to look
        raise UserError(f"cannot read record {record.id}: {type(error).__name__}: {error}") from error


def _kept(given: Given) -> Given:
    """A copy: a recipe may write its next sample into the same arrays."""
    if isinstance(given, Table):
        return Table({name: column.copy() for name, column in given.columns.items()})
    return {name: copy(array) for name, array in given.items()} if isinstance(given, MAPPINGS) else given


def _one_behind(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work` of each item, in order, in a thread beside the one that makes the next item."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for item in items:
            if pending:
                yield pending.result()
            pending = pool.submit(work, item)
        if pending:
            yield pending.result()


class _Full(NamedTuple):
    """What makes a shard."""

    split: Split
    ids: Ragged
    columns: Mapping[str, Column]


class _ShardBuilder:
    """Collects samples until they fill a shard. Boundaries depend on the samples alone."""

    def __init__(self, split: Split, shard_bytes: int, fields: dict[str, FieldInfo], ragged: Collection[str]) -> None:
        """`fields` is shared by a partition's builders, and filled from the first sample."""
        self._split = split
        self._shard_bytes = shard_bytes
        self._fields = fields
        self._ragged = ragged
        self._alike: dict[str, tuple[np.dtype[Any], tuple[int | None, ...]]] = {}
        self._clear()

    def _clear(self) -> None:
        self._num_rows = 0
        self._num_bytes = self._fixed_bytes = 0
        self._ids: list[str] = []
        self._id_columns: list[Ragged] = []
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, list[Array]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._num_rows

    def add(self, record: str, samples: Iterable[Given]) -> Iterator[_Full]:
        """Take a record's samples, and give each shard that they fill.

        All is copied at once: a recipe may write its next sample into the same arrays.
        """
        number = 0
        for given in samples:
            if isinstance(given, Table):
                yield from self._add_table(f"{record}#", number, given)
                number += len(given)
            else:
                self._add_sample(f"{record}#{number}", given)
                number += 1
                if self._num_bytes >= self._shard_bytes:
                    yield self.take()

    def _add_sample(self, sample_id: str, sample: Sample) -> None:
        self._prepare(sample_id, sample)
        row = self._num_rows
        for name, column in self._columns.items():
            column[row] = sample[name]
        for name, rows in self._rows.items():
            rows.append(sample[name].copy())
            self._num_bytes += rows[-1].nbytes
        self._ids.append(sample_id)
        self._num_bytes += self._fixed_bytes + len(sample_id)
        self._num_rows += 1

    def _add_table(self, prefix: str, number: int, table: Table) -> Iterator[_Full]:
        """As if its rows came one by one, the first with this number."""
        start = 0
        while start < len(table):
            self._prepare(f"{prefix}{number + start}", table.row(start))
            stop = self._add_rows(prefix, number, table, start)
            start = stop
            if self._num_bytes >= self._shard_bytes:
                yield self.take()

    def _add_rows(self, prefix: str, number: int, table: Table, start: int) -> int:
        """Those that the shard has room for, and the one that fills it. Gives where they stop."""
        row_bytes = self._fixed_bytes + sum(table.columns[name][start].nbytes for name in self._rows) + len(prefix)
        missing = self._shard_bytes - self._num_bytes
        candidates = np.arange(start, min(len(table), start + missing // (row_bytes + 1) + 1))
        filled = np.cumsum(row_bytes + num_digits(number + candidates))
        num_rows = min(len(candidates), int(np.searchsorted(filled, missing)) + 1)
        stop = start + num_rows
        for name, column in self._columns.items():
            column[self._num_rows : self._num_rows + num_rows] = table.columns[name][start:stop]
        for name, rows in self._rows.items():
            rows.extend(table.columns[name][start:stop].copy())
        self._close_ids()
        self._id_columns.append(numbered_ids(prefix, range(number + start, number + stop)))
        self._num_bytes += int(filled[num_rows - 1])
        self._num_rows += num_rows
        return stop

    def _close_ids(self) -> None:
        if self._ids:
            self._id_columns.append(id_column(self._ids))
            self._ids = []

    def take(self) -> _Full:
        self._close_ids()
        columns: dict[str, Column] = {name: column[: self._num_rows] for name, column in self._columns.items()}
        columns |= {name: Ragged.stack(rows) for name, rows in self._rows.items()}
        full = _Full(self._split, Ragged.join(self._id_columns), columns)
        self._clear()
        return full

    def _prepare(self, sample_id: str, sample: Sample) -> None:
        """Raises `UserError` unless it is a sample with the fields of those before."""
        if not isinstance(sample, MAPPINGS):
            raise UserError(f"record {sample_id}: encode() must give dicts of numpy arrays, not {type(sample)}")
        if not self._is_alike(sample):
            self._require_same_fields(sample_id, sample)
        if not self._num_rows:
            self._allocate()

    def _allocate(self) -> None:
        """Columns for as many rows as a shard can have; memory that no row comes to is never touched."""
        fixed = {name: field for name, field in self._fields.items() if name not in self._ragged}
        row_types = {name: np.dtype((field.dtype, field.shape)) for name, field in fixed.items()}
        self._fixed_bytes = sum(row_type.itemsize for row_type in row_types.values())
        num_rows = self._shard_bytes // (self._fixed_bytes + len("#0")) + 1
        self._columns = {name: np.empty(num_rows, row_type) for name, row_type in row_types.items()}
        self._rows = {name: [] for name in self._fields if name in self._ragged}

    def _is_alike(self, sample: Sample) -> bool:
        """Whether its arrays are like those before: to ask is ten times quicker than to describe them."""
        for name, (dtype, shape) in self._alike.items():
            array = sample.get(name)
            if not isinstance(array, ARRAYS) or array.dtype != dtype:
                return False
            if array.shape != shape and self._shape_of(name, array) != shape:
                return False
        return len(sample) == len(self._alike)

    def _shape_of(self, name: str, array: Array) -> tuple[int | None, ...]:
        return (None, *array.shape[1:]) if name in self._ragged and array.ndim else array.shape

    def _require_same_fields(self, sample_id: str, sample: Sample) -> None:
        fields = {name: self._declared(sample_id, name, array) for name, array in sample.items()}
        if not self._fields:
            self._fields.update(fields)
        if fields != self._fields:
            raise UserError(f"record {sample_id}: its fields are {fields}, where those before had {self._fields}")
        self._alike = {name: (array.dtype, fields[name].shape) for name, array in sample.items()}

    def _declared(self, sample_id: str, name: str, array: Array) -> FieldInfo:
        if not isinstance(name, str) or not isinstance(array, ARRAYS):
            raise UserError(f"record {sample_id}: field {name!r} is a {type(array).__name__}, not a numpy array")
        if not dtype_is_known(array.dtype):
            raise UserError(f"record {sample_id}: field {name!r} has dtype {array.dtype}")
        if not name or "." in name or name == "__metadata__":
            raise UserError(f"record {sample_id}: field {name!r} must have another name, without a dot")
        if name in self._ragged and array.ndim == 0:
            raise UserError(f"record {sample_id}: field {name!r} is in the recipe's `ragged`, but has no length")
        if 0 in array.shape[name in self._ragged :]:
            raise UserError(f"record {sample_id}: field {name!r} has shape {list(array.shape)}: nothing is in it")
        return FieldInfo(dtype=array.dtype.name, shape=self._shape_of(name, array))
