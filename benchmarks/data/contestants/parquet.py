"""Parquet by pyarrow: one file per 8 MiB, read by batches in order; it has no shuffle of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.records import BATCH_SIZE, SHARD_BYTES, Kind


def _files() -> Any:
    from pyarrow import fs

    return fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], scheme="http", region="us-east-1")


def write(kind: Kind, url: str, cache: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    size, num_values = SHARD_BYTES // kind.sample_bytes, int(np.prod(kind.shape))
    for number, start in enumerate(range(0, kind.num_samples, size)):
        samples = [kind.sample(index) for index in range(start, min(start + size, kind.num_samples))]
        flat = pa.array(np.concatenate([sample["x"].reshape(-1) for sample in samples]))
        table = pa.table(
            {
                "x": pa.FixedSizeListArray.from_arrays(flat, num_values),
                "y": pa.array([int(sample["y"]) for sample in samples]),
            }
        )
        path = f"{url.removeprefix('s3://')}/{number:06}.parquet"
        parquet.write_table(table, path, filesystem=_files(), compression="none", use_dictionary=False)


def read(kind: Kind, url: str, cache: Path, *, shuffled: bool) -> Iterator[tuple[Any, Any]]:
    from pyarrow import fs, parquet

    files = _files()
    found = files.get_file_info(fs.FileSelector(url.removeprefix("s3://")))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for info in sorted(found, key=lambda info: info.path)[rank::world_size]:
        with files.open_input_file(info.path) as stream:
            for batch in parquet.ParquetFile(stream, pre_buffer=True).iter_batches(batch_size=BATCH_SIZE):
                x = batch.column("x").flatten().to_numpy().reshape(batch.num_rows, *kind.shape)
                yield x, batch.column("y").to_numpy()
