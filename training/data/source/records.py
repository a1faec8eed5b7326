"""From a file to its records, one at a time, by the format that the preset names."""

from __future__ import annotations

import base64
import gzip
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from training.config import DataConfig
from training.data.source.partition import Partition
from training.data.source.places import Source, SourceFile
from training.data.source.tar import MAX_RECORD_BYTES, WHICH_COUNT, tar_samples
from training.documents import canonical_json
from training.errors import UserError
from training.recipe import Record

Records = Iterator[Record]
READING = 2
"""Raise it when a file gives other records than before, or is refused: then what is finished is read anew."""
MAX_ROWS = 1024
PARQUET_BYTES = 8 << 20
PACKED = frozenset({".bz2", ".xz", ".lzma", ".zst", ".lz4", ".br", ".zip", ".7z", ".z"})
"""Suffixes of what would be taken for lines of garbage."""


def read_records(source: Source, partition: Partition, config: DataConfig, classes: tuple[str, ...] = ()) -> Records:
    """Every record of a partition, in order. `classes` are the labels of `format = "folders"`.

    Raises `UserError` naming the file and the place where it cannot be read.
    """
    read = READERS[config.format]
    for file in partition.files:
        with source.open(file) as stream:
            for record in read(file, stream):
                yield _labelled(record, file, classes) if classes else record


def content_of(record: Record) -> bytes:
    """The bytes of a record, whatever its format: what decides its split."""
    if not record.fields:
        return record.data
    return canonical_json({name: _jsonable(value) for name, value in record.fields.items()})


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else repr(value)


def _labelled(record: Record, file: SourceFile, classes: tuple[str, ...]) -> Record:
    return Record(id=record.id, data=record.data, label=classes.index(file.name.partition("/")[0]))


def _whole_file(file: SourceFile, stream: BinaryIO) -> Records:
    yield Record(id=file.name, data=stream.read())


def _lines(file: SourceFile, stream: BinaryIO) -> Records:
    suffix = PurePosixPath(file.name.lower()).suffix
    if suffix in PACKED:
        raise UserError(f"{file.name}: of packed lines only .gz is read: unpack it, or pack it anew with gzip")
    if suffix == ".gz":
        if not file.num_bytes:
            raise UserError(f"{file.name}: damaged gzip data: the file is empty, which no packed one is")
        stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]  # it is an BinaryIO in all that is used
    number = 0
    try:
        for number, line in enumerate(_limited(file, stream), start=1):
            text = line.rstrip(b"\r\n")
            if text:
                yield Record(id=f"{file.name}:{number}", data=text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{file.name}: damaged gzip data after line {number}: {error}") from error


def _limited(file: SourceFile, stream: BinaryIO) -> Iterator[bytes]:
    """Its lines. Raises `UserError` for one that would not end, as in a file that unpacks to one of terabytes."""
    number = 0
    while line := stream.readline(MAX_RECORD_BYTES + 1):
        number += 1
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{file.name}: line {number} is longer than {MAX_RECORD_BYTES} bytes")
        yield line


def _parquet_rows(file: SourceFile, stream: BinaryIO) -> Records:
    """A record per row, read by small batches: its columns are the fields."""
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(
            stream, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as table:
            _require_different_names(file, table.schema_arrow.names)
            for batch in table.iter_batches(batch_size=_num_rows_at_once(table.metadata)):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(id=f"{file.name}:{number}", data=b"", fields=row)
    except (pa.ArrowException, OSError, OverflowError, ValueError, LookupError) as error:
        where = f"{file.name}: not readable as data.format = 'parquet' after row {number}"
        raise UserError(f"{where}: {error} ({WHICH_COUNT})") from error


def _require_different_names(file: SourceFile, names: Sequence[str]) -> None:
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UserError(f"{file.name}: two columns have the name {twice[0]!r}")


def _num_rows_at_once(about: Any) -> int:
    """Some megabytes of them, as Python's own objects."""
    num_rows, num_groups = int(about.num_rows), int(about.num_row_groups)
    num_bytes = sum(int(about.row_group(number).total_byte_size) for number in range(num_groups))
    return max(1, min(MAX_ROWS, PARQUET_BYTES * max(1, num_rows) // max(1, num_bytes)))


READERS: dict[str, Callable[[SourceFile, BinaryIO], Records]] = {
    "files": _whole_file,
    "folders": _whole_file,
    "jsonl": _lines,
    "csv": _lines,
    "parquet": _parquet_rows,
    "webdataset": tar_samples,
}
