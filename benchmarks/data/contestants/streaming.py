"""MosaicML Streaming: `MDSWriter`, read by `StreamingDataset` and `StreamingDataLoader` with their defaults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3.s3.transfer  # noqa: F401 (imported when first needed, and imports are not timed)
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.distributed import maybe_init_dist
from streaming.base.util import clean_stale_shared_memory

from benchmarks.data.contestants.protocol import BATCH_SIZE, SEED, Task, serve, stack
from benchmarks.data.records import Batch, Kind, read_file, samples, source_files


def _columns(kind: Kind) -> dict[str, str]:
    shaped = {name: (dtype, ",".join(map(str, shape))) for name, dtype, shape in kind.layout}
    names = {"<i8": "int64", "u1": "uint8", "<i4": "int32"}
    return {name: f"ndarray:{names[d]}:{shape}" if shape else names[d] for name, (d, shape) in shaped.items()}


def write(task: Task) -> Callable[[], None]:
    os.environ["TMPDIR"] = task.scratch

    def work() -> None:
        out = (str(Path(task.scratch) / "out"), f"s3://{task.bucket}/data")
        with MDSWriter(out=out, columns=_columns(task.kind), size_limit=task.chunk_bytes) as sink:
            for path in source_files(task.source):
                for sample in samples(read_file(path, task.kind)):
                    sink.write(sample)

    return work


def read(task: Task, rank: int) -> Callable[[], Iterable[Batch]]:
    maybe_init_dist()
    clean_stale_shared_memory()

    def work() -> Iterable[Batch]:
        data: Any = StreamingDataset(
            remote=f"s3://{task.bucket}/data",
            local=task.scratch,
            batch_size=BATCH_SIZE,
            shuffle=task.shuffled,
            shuffle_seed=SEED,
        )
        found: Iterable[Batch] = StreamingDataLoader(data, batch_size=BATCH_SIZE, collate_fn=stack)
        return found

    return work


if __name__ == "__main__":
    serve(write, read)
