"""Small sources on disk and in S3, and a configuration for them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from tests.unit.tiny import NUM_CLASSES
from training.config import DataConfig
from training.data.source import Source, open_source
from training.s3.objectstore import StoreLocation


def tiny_line(number: int) -> str:
    """A record that the tiny recipe reads; every number gives another one."""
    return ",".join(str(number * 7919 % (101 + place)) for place in range(4)) + f",{number},{number % NUM_CLASSES}"


def write_csv(path: Path, numbers: range) -> None:
    text = "".join(f"{tiny_line(number)}\n" for number in numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text)


def write_files(folder: Path, *, num_files: int) -> None:
    """Files of 60 records each, a partition each."""
    for number in range(num_files):
        write_csv(folder / f"raw/{number}.csv", range(number * 60, (number + 1) * 60))


def data_config(**changes: Any) -> DataConfig:
    """Shards of about 20 records, partitions of about one file."""
    settings: dict[str, Any] = {
        "name": "tiny",
        "source": "raw",
        "format": "csv",
        "test_percent": 20,
        "shard_bytes": 1024,
        "partition_bytes": 1024,
    }
    return DataConfig(**{**settings, **changes})


def local_source(folder: Path, config: DataConfig) -> Source:
    return open_source(config, folder=str(folder), location=StoreLocation(endpoint=None, bucket="unused"))
