"""How a source is cut into partitions, the units that writers shard side by side and never twice."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from training.config import DataConfig
from training.data.source.places import Source, SourceFile
from training.documents import digest_of
from training.errors import UserError

MAX_FILL = 4
"""A partition is ended at so many times its size, whatever the names say."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A run of files that one writer task shards."""

    files: tuple[SourceFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def partitions(source: Source, config: DataConfig) -> list[Partition]:
    """The source's files, in order, cut into runs of about `partition_bytes`.

    Raises `UserError` if there is nothing to read.
    """
    runs = [Partition(files=tuple(run)) for run in cut(source.list_files(), config.partition_bytes)]
    if not runs:
        raise UserError(f"data.source = {config.source!r} holds no file that matches data.glob = {config.glob!r}")
    return runs


def cut(files: Iterator[SourceFile], partition_bytes: int) -> Iterator[list[SourceFile]]:
    """Runs of files. A file's own name and size say whether a run ends with it, so that a file that is added or removed
    changes the run that it falls into and no other (content-defined chunking; Muthitacharoen et al., SOSP'01).
    """
    run: list[SourceFile] = []
    num_bytes = 0
    for file in files:
        run.append(file)
        num_bytes += file.num_bytes
        if _ends_a_run(file, partition_bytes) or num_bytes >= MAX_FILL * partition_bytes:
            yield run
            run, num_bytes = [], 0
    if run:
        yield run


def _ends_a_run(file: SourceFile, partition_bytes: int) -> bool:
    """With a chance of its share of a partition, as a hash of its name falls."""
    return xxhash.xxh3_64_intdigest(file.name.encode()) * partition_bytes < file.num_bytes << 64


def classes_of(parts: Sequence[Partition]) -> tuple[str, ...]:
    """The names of the first folders, in order: what the labels count. Raises `UserError` for a file in none."""
    for part in parts:
        for file in part.files:
            if "/" not in file.name:
                raise UserError(f"{file.name}: data.format = 'folders' needs every file in a folder that is its label")
    return tuple(sorted({file.name.partition("/")[0] for part in parts for file in part.files}))


def content_digests(source: Source, partition: Partition) -> dict[str, str]:
    """The sha256 of each of a partition's files, by name."""
    return {file.name: source.content_digest(file) for file in partition.files}


def _is_in(record: str, files: Collection[str]) -> bool:
    """Whether a record's id (`file`, `file:place`) is in one of these files. Both may have colons of their own."""
    return record in files or any(record[:end] in files for end, sign in enumerate(record) if sign == ":")


def partition_fingerprint(digests: Mapping[str, str], *, encoding: str, withdrawn: Collection[str] = ()) -> str:
    """Names a partition's input bytes, what encodes them, and which of its records are left out."""
    files = [list(item) for item in digests.items()]
    left_out = sorted(record for record in withdrawn if _is_in(record, digests))
    return digest_of({"files": files, "encoding": encoding, **({"withdrawn": left_out} if left_out else {})})
