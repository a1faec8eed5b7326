"""Parquet through pyarrow: one row group per file, no dictionary and no compression (the payload is random).

A data set scan reads ahead in threads of its own. Page checksums are off, as they are by default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as fs
import pyarrow.parquet as pq

from benchmarks.data.contestants import s3
from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve
from benchmarks.data.records import Array, Batch, Kind, read_file, rebatch, source_files


def _filesystem() -> fs.S3FileSystem:
    keys: Any = boto3.Session().get_credentials()
    where = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    return fs.S3FileSystem(
        access_key=keys.access_key, secret_key=keys.secret_key, endpoint_override=where.netloc, scheme=where.scheme
    )


def _packed(name: str, column: Array) -> pa.Array:
    """A column whose rows are arrays becomes fixed-size binary: the fastest that Parquet has for them."""
    if column.ndim == 1:
        return pa.array(column)
    data = np.ascontiguousarray(column)
    width = data[0].nbytes
    return pa.Array.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data)])


def write(task: Task) -> Callable[[], None]:
    def work() -> None:
        store = _filesystem()
        paths = source_files(task.source)
        num_together = max(1, task.chunk_bytes // paths[0].stat().st_size)
        for start in range(0, len(paths), num_together):
            tables = [read_file(path, task.kind) for path in paths[start : start + num_together]]
            names = list(tables[0])
            joined = {name: _packed(name, np.concatenate([table[name] for table in tables])) for name in names}
            key = f"{task.bucket}/{start:05d}.parquet"
            pq.write_table(pa.table(joined), key, filesystem=store, use_dictionary=False, compression="none")

    return work


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    random = np.random.default_rng(SEED)
    names = s3.keys(task.bucket)
    if task.shuffled:
        random.shuffle(names)
    paths = [f"{task.bucket}/{name}" for name in names[rank :: task.num_processes]]

    def tables() -> Iterator[Batch]:
        for part in ds.dataset(paths, filesystem=_filesystem()).to_batches(fragment_readahead=2):
            table = {name: _unpacked(part.column(name), name, task.kind) for name in part.schema.names}
            order = random.permutation(part.num_rows) if task.shuffled else slice(None)
            yield {name: column[order] for name, column in table.items()}

    return lambda: rebatch(tables(), BATCH_SIZE)


def _unpacked(column: Any, name: str, kind: Kind) -> Array:
    if not pa.types.is_fixed_size_binary(column.type):
        found: Array = column.to_numpy()
        return found
    field = kind.dtype[name]
    width = column.type.byte_width
    body = np.frombuffer(column.buffers()[1], dtype=np.uint8)[column.offset * width :][: len(column) * width]
    return body.view(field.base).reshape(len(column), *field.shape)


if __name__ == "__main__":
    serve(write, read)
