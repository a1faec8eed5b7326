"""Partitions to shards, receipts and the manifest, in this order; so a killed writer is simply run again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import TypeVar

from training.config import DataConfig
from training.data.builder import FullShard, Given, ShardBuilder, Spares, encoded, kept
from training.data.finished import Finished, Receipt
from training.data.lease import Lease, publish, writing
from training.data.manifest import (
    SPLITS,
    FieldInfo,
    Manifest,
    ShardInfo,
    Split,
    describe_shard,
    difference,
    receipt_key,
)
from training.data.shard import FORMAT, shard_pieces
from training.data.source import (
    READING,
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
    require_none_withdrawn_since,
)
from training.documents import digest_of, sha256_hex
from training.errors import UserError
from training.recipe import Recipe, Record
from training.s3.objectstore import Store
from training.sources import source_closure_digest


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """A finished partition: its receipt and where that lies, and how much had to be done for it."""

    key: str
    receipt: Receipt
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


Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[PartResult], None]
NUM_AT_ONCE = min(8, max(4, len(os.sched_getaffinity(0))))
"""Partitions. One keeps a core busy, and has a shard on its way meanwhile; a far store takes its time for each."""
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
    """Shards one source. `write` may be called for its `parts` in any order, by many threads at once;
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
        self._finished = Finished(store, config.name, withdrawn_contents=self._withdrawn_contents)
        self._spares = Spares()
        encoding = {
            "format": FORMAT,
            "reading": READING,
            "recipe": source_closure_digest(recipe),
            "hyperparameters": asdict(recipe),
            "record_format": config.format,
            "test_percent": config.test_percent,
            "shard_bytes": config.shard_bytes,
        }
        self._encoding = digest_of({**encoding, **({"classes": self._classes} if self._classes else {})})

    def write(self, part: Partition) -> PartResult:
        """Shard a partition and leave its receipt; nothing is done if it is finished and its shards are whole."""
        is_read_once = self._finished.is_nothing and self._config.format in WHOLE_FILES
        digests = {} if is_read_once else content_digests(self._source, part)
        key = self._receipt_key(digests)
        if (receipt := self._finished.maybe_receipt(key)) is not None:
            return PartResult(key=key, receipt=receipt, num_bytes=part.num_bytes, is_reused=True, num_shards_sent=0)
        receipt, num_sent = self._write(part, digests)
        for file in part.files:  # or the receipt would say that other bytes gave these shards
            self._source.require_unchanged(file)
        key = self._receipt_key(digests)  # known by now of files that are read once
        self._finished.put_receipt(key, receipt)
        return PartResult(key=key, receipt=receipt, num_bytes=part.num_bytes, is_reused=False, num_shards_sent=num_sent)

    def finish(self, results: Sequence[PartResult], lease: Lease) -> WriteResult:
        """The manifest of the partitions' results, given in their order.

        Raises `UserError` if they do not fit together, `InfrastructureError` if that must be found out again: the
        `lease` lapsed once more, or records were withdrawn since they were read.
        """
        if not lease.is_sure:  # away for so long that a collector may have taken shards
            lease.enter_again()
            self._finished.look_again()
            results = [self.write(part) for part in self.parts]
        receipts = [result.receipt for result in results]
        manifest = _merge(self.parts, receipts, self._config, self._classes)
        publish(self._store, self._config.name, manifest, lease)
        require_none_withdrawn_since(self._store, self._config.name, self._withdrawn)
        return WriteResult(
            manifest=manifest,
            num_partitions=len(results),
            num_partitions_reused=sum(result.is_reused for result in results),
            num_shards_sent=sum(result.num_shards_sent for result in results),
            displaced=tuple(record for receipt in receipts for record in receipt.displaced),
        )

    def _receipt_key(self, digests: Mapping[str, str]) -> str:
        fingerprint = partition_fingerprint(digests, encoding=self._encoding, withdrawn=self._withdrawn)
        return receipt_key(self._config.name, fingerprint)

    def _write(self, part: Partition, digests: dict[str, str]) -> tuple[Receipt, int]:
        """`digests` are those of files; what is read once is added to them."""
        fields: dict[str, FieldInfo] = {}
        shard_bytes, ragged = self._config.shard_bytes, self._recipe.ragged
        builders = {split: ShardBuilder(split, shard_bytes, fields, ragged, self._spares) for split in SPLITS}
        shards: dict[Split, list[ShardInfo]] = {split: [] for split in SPLITS}
        num_sent = 0
        displaced: list[str] = []
        for split, info, is_new in _one_behind(self._send, self._full(part, builders, digests, displaced)):
            shards[split].append(info)
            num_sent += is_new
        splits = {split: tuple(shards[split]) for split in SPLITS}
        return Receipt(fields=fields, splits=splits, displaced=tuple(displaced)), num_sent

    def _send(self, full: FullShard) -> tuple[Split, ShardInfo, bool]:
        pieces = shard_pieces(full.ids, full.columns)
        info = describe_shard(*pieces, num_samples=len(full.ids))
        is_new = self._finished.put_shard(info.sha256, pieces)
        self._spares.give(full.memory)
        return full.split, info, is_new

    def _full(
        self,
        part: Partition,
        builders: Mapping[Split, ShardBuilder],
        digests: dict[str, str],
        displaced: list[str],
    ) -> Iterator[FullShard]:
        """The partition's samples by full shards, and at the end what is left."""
        for record in read_records(self._source, part, self._config, self._classes):
            samples = encoded(self._recipe, record)
            if self._withdrawn:
                samples = iter(self._unless_withdrawn(record.id, [*map(kept, samples)], displaced))
            builder = builders[self._split_of(record, digests)]
            yield from builder.add(record.id, samples)
        yield from (builder.take() for builder in builders.values() if not builder.is_empty)

    def _split_of(self, record: Record, digests: dict[str, str]) -> Split:
        if self._config.format not in WHOLE_FILES:
            return split_of(record, self._config.test_percent)
        if record.id not in digests:
            digests[record.id] = sha256_hex(record.data)
        return split_of(record, self._config.test_percent, sha256=digests[record.id])

    def _unless_withdrawn(self, record: str, samples: list[Given], displaced: list[str]) -> list[Given]:
        """None of them if their record is withdrawn: by its id, or by what is in it, wherever it lies by now."""
        content = content_of_samples(samples)
        if content in self._withdrawn_contents:
            return []
        if record in self._withdrawn:
            displaced.append(record)
            return []
        return samples


def _merge(
    parts: Sequence[Partition], receipts: Sequence[Receipt], config: DataConfig, classes: tuple[str, ...]
) -> Manifest:
    fields = next((receipt.fields for receipt in receipts if receipt.fields), {})
    for part, receipt in zip(parts, receipts, strict=True):
        told = receipt.fields and difference(receipt.fields, fields)
        if told:
            raise UserError(f"{part.files[0].name}: its samples' fields are not those of the files before: {told}")
    splits = {split: tuple(shard for r in receipts for shard in r.splits[split]) for split in SPLITS}
    for split, shards in splits.items():
        if not shards:
            raise UserError(
                f"data.source = {config.source!r} gives no sample for the {split} split: it is too small for"
                f" data.test_percent = {config.test_percent} (equal records count as one), or the recipe's encode()"
                " yields nothing"
            )
    return Manifest(fields=fields, splits=splits, classes=classes)


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
