"""This library. Adapt `read` when its reader changes; nothing else in the bench knows of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import boto3  # noqa: F401 (imported when first needed, and imports are not timed)
import botocore.auth
import botocore.config  # noqa: F401
import numpy as np
import pydantic

from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve
from benchmarks.data.records import KINDS, Batch, columns, samples
from training.arithmetic.reduce import owned_range
from training.config import DataConfig
from training.data.cache import ShardCache, fetch_from
from training.data.lease import writing
from training.data.manifest import SPLITS, load_manifest
from training.data.order import Order
from training.data.reader import Reader
from training.data.source import open_source
from training.data.stream import Stream
from training.data.writer import NUM_AT_ONCE, Writer
from training.recipe import Recipe, Record, Sample, Table
from training.s3.objectstore import Store, StoreLocation

NAME = "bench"
VIRTUAL_WORKERS = 2
WINDOW_SHARDS = 4
pydantic.TypeAdapter(int)  # whose first use looks for plugins in all that is installed: an import, so to speak


def _no_model(*_: Any) -> NoReturn:
    raise NotImplementedError("the bench trains nothing")


@dataclass(frozen=True, kw_only=True)
class Unpack(Recipe):
    """One raw file holds many samples."""

    kind_name: str
    is_one_by_one: bool = False
    model = loss = scores = inputs = optimizer = cast(Any, _no_model)

    def encode(self, record: Record) -> Iterable[Sample | Table]:
        table = columns(np.frombuffer(record.data, dtype=KINDS[self.kind_name].dtype))
        return samples(table) if self.is_one_by_one else (Table(table),)


def _location(task: Task) -> StoreLocation:
    return StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=task.bucket)


def write(task: Task) -> Callable[[], None]:
    config = DataConfig(name=NAME, source=task.source, format="files", test_percent=10)
    store = Store(_location(task))

    def work() -> None:
        """As the shard stage does outside a flow: some partitions at a time."""
        source = open_source(config, folder="", location=_location(task))
        writer = Writer(store, source, config, Unpack(kind_name=task.kind_name))
        with writing(store, NAME) as lease, ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            writer.finish(list(pool.map(writer.write, writer.parts)), lease)

    return work


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    """Both splits as one list of shards. In order as evaluation reads, shuffled as training does."""
    store = Store(_location(task))
    ((key, _),) = store.list_keys(f"datasets/{NAME}/manifests/")
    manifest = load_manifest(store, NAME, key.rpartition("/")[2].removesuffix(".json"))
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    if not task.shuffled:
        shards = [shards[number] for number in owned_range(rank, task.num_processes, len(shards))]
    sizes = tuple(shard.num_samples for shard in shards)

    def work() -> Iterable[Batch]:
        reader = Reader(ShardCache(fetch_from(store, NAME), shards), sizes, manifest.fields)
        if not task.shuffled:
            return (rows.fields for rows in reader.read_all(batch_size=BATCH_SIZE))
        order = Order(sizes, SEED, BATCH_SIZE * VIRTUAL_WORKERS, VIRTUAL_WORKERS, WINDOW_SHARDS)
        return _one_epoch(reader, order, owned_range(rank, task.num_processes, VIRTUAL_WORKERS))

    return work


def _one_epoch(reader: Reader, order: Order, workers: range) -> Iterator[Batch]:
    """Without what the last batch takes of the next epoch."""
    num_steps = -(-order.num_samples // order.batch_size)
    for batch in Stream(reader, order, workers=workers, step=0, num_steps=num_steps):
        start = batch.step * order.batch_size + batch.worker * BATCH_SIZE
        kept = min(BATCH_SIZE, order.num_samples - start)
        if kept > 0:
            yield {name: field[:kept] for name, field in batch.fields.items()}


if __name__ == "__main__":
    serve(write, read)
