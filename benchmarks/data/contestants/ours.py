"""Unbroken: the writer's partitions by threads, the reader as evaluation uses it, the stream as training does."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import boto3  # noqa: F401  # imports are not timed
import obstore.auth.boto3  # noqa: F401
import pydantic  # noqa: F401

from benchmarks.data.records import BATCH_SIZE, KINDS, SHARD_BYTES, Kind
from training.config import DataConfig
from training.data.cache import ShardCache, fetch_from
from training.data.collect import find_version
from training.data.lease import writing
from training.data.manifest import load_manifest
from training.data.order import Order
from training.data.reader import Reader
from training.data.source import SourceFile
from training.data.stream import Stream
from training.data.writer import Writer
from training.objectstore import Store, StoreLocation
from training.recipe import Recipe, Record, Sample
from training.reduce import owned_range

NUM_PARTS = 8
VIRTUAL_WORKERS = 2


class Numbers:
    """A source of records that are only numbers: the samples are made from them."""

    def __init__(self, kind: Kind) -> None:
        self._share = kind.num_samples // NUM_PARTS

    def list_files(self) -> Iterator[SourceFile]:
        yield from (SourceFile(name=f"{part}", num_bytes=1 << 20, changed="") for part in range(NUM_PARTS))

    def open(self, file: SourceFile) -> BinaryIO:
        start = int(file.name) * self._share
        return io.BytesIO(b"".join(b"%d\n" % index for index in range(start, start + self._share)))

    def content_digest(self, file: SourceFile) -> str:
        return file.name


@dataclass(frozen=True, kw_only=True)
class Generated(Recipe):
    """Makes the benchmark's samples; it is never trained."""

    kind: str = "image"

    def encode(self, record: Record) -> Iterable[Sample]:
        yield KINDS[self.kind].sample(int(record.data))

    def model(self) -> Any: ...
    def loss(self, model: Any, batch: Any) -> Any: ...
    def scores(self, model: Any, batch: Any) -> Any: ...
    def inputs(self, batch: Any) -> Any: ...
    def optimizer(self, model: Any) -> Any: ...


def open_store(url: str) -> Store:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return Store(StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=bucket, prefix=prefix + "/"))


def write(kind: Kind, url: str, cache: Path) -> None:
    config = DataConfig(
        name=kind.name, source="", format="jsonl", test_percent=1, shard_bytes=SHARD_BYTES, partition_bytes=1 << 20
    )
    store = open_store(url)
    writer = Writer(store, Numbers(kind), config, Generated(kind=kind.name))
    with writing(store, kind.name) as lease, ThreadPoolExecutor(4) as pool:
        writer.finish(list(pool.map(writer.write, writer.parts)), lease)


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    """Both splits, so that every sample is read."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(url)
    name, digest = find_version(store, kind.name)
    manifest = load_manifest(store, name, digest)
    shards = (*manifest.splits["train"], *manifest.splits["test"])
    if not shuffled:
        shards = tuple(shards[n] for n in owned_range(rank, world_size, len(shards)))
    sizes = tuple(shard.num_samples for shard in shards)
    reader = Reader(ShardCache(fetch_from(store, name), shards), sizes, manifest.fields)
    if not shuffled:
        for rows in reader.read_all(batch_size=BATCH_SIZE):
            yield rows.fields["x"], rows.fields["y"]
        return
    order = Order(sizes, 1, BATCH_SIZE * VIRTUAL_WORKERS, VIRTUAL_WORKERS, 4)
    workers = owned_range(rank, world_size, VIRTUAL_WORKERS)
    num_steps = -(-order.num_samples // order.batch_size)
    for batch in Stream(reader, order, workers=workers, step=0, num_steps=num_steps):
        kept = min(BATCH_SIZE, order.num_samples - batch.step * order.batch_size - batch.worker * BATCH_SIZE)
        if kept > 0:  # the last step goes on into the next epoch
            yield batch.fields["x"][:kept], batch.fields["y"][:kept]
