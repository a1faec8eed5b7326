"""`[data]`: where raw samples come from, and into what they are sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.config.checks import require, require_name


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read and how to shard it."""

    name: str
    """Name of the dataset: its folder in the bucket."""
    source: str
    """A file or folder: a path, `s3://bucket/prefix`, `package://PACKAGE/path` or `stdlib://`."""
    format: Literal["files", "folders", "jsonl", "csv", "parquet", "webdataset"]
    """What is a record: a file; a file whose first folder is its label; a line (`.gz` is unpacked); a row; a group of
    members of a tar archive."""
    glob: str = "*"
    """Which files of a folder count, by their names alone (`*.csv`), however deep they lie."""
    exclude: tuple[str, ...] = ()
    """Folders, by name, that do not count."""
    test_percent: int = 10
    """Share of the records held out, chosen by a hash of each record's bytes: equal records never part."""
    shard_bytes: int = 8 * 2**20 - 2**16
    """About how many bytes of samples make a shard. With its header it then fits one chunk of 8 MiB, as many stores cut
    objects."""
    partition_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        require_name("data.name", self.name)
        require("/" not in self.glob, "data.glob", f"= {self.glob!r} is compared with files' names: without folders")
        require(0 < self.test_percent < 100, "data.test_percent", "must lie between 1 and 99")
        require(self.shard_bytes >= 1024, "data.shard_bytes", "must be at least 1024")
        require(self.partition_bytes >= 1024, "data.partition_bytes", "must be at least 1024")
