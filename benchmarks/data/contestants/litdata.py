"""LitData: `optimize` with one worker, read by `StreamingDataset` and `StreamingDataLoader` with their defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3  # noqa: F401 (imported when first needed, and imports are not timed)
import litdata
import obstore.store  # noqa: F401
from litdata.streaming import downloader

from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve, stack
from benchmarks.data.records import KINDS, Batch, read_file, samples, source_files

downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it would refuse any store without TLS


def _samples(kind_name: str, path: str) -> Iterator[dict[str, Any]]:
    for sample in samples(read_file(path, KINDS[kind_name])):
        yield {name: int(value) if value.ndim == 0 else value for name, value in sample.items()}


def _storage() -> dict[str, str]:
    return {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}


def write(task: Task) -> Callable[[], None]:
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(Path(task.scratch) / "chunks")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(Path(task.scratch) / "data")

    def work() -> None:
        litdata.optimize(
            fn=partial(_samples, task.kind_name),
            inputs=[str(path) for path in source_files(task.source)],
            output_dir=f"s3://{task.bucket}/data",
            chunk_bytes=task.chunk_bytes,
            num_workers=1,
            start_method="fork",
            storage_options=_storage(),
            verbose=False,
        )

    return work


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    def work() -> Iterable[Batch]:
        data = litdata.StreamingDataset(
            f"s3://{task.bucket}/data",
            cache_dir=str(Path(task.scratch) / str(rank)),
            shuffle=task.shuffled,
            drop_last=False,
            seed=SEED,
            storage_options=_storage(),
        )
        found: Iterable[Batch] = litdata.StreamingDataLoader(data, batch_size=BATCH_SIZE, collate_fn=stack)
        return found

    return work


if __name__ == "__main__":
    serve(write, read)
