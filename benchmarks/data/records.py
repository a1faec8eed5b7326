"""The raw records that every contestant starts from: files of ~1 MiB, many records each, always the same bytes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Batch = Mapping[str, Array]
SEED = 20


@dataclass(frozen=True)
class Kind:
    """A kind of record. `payload` is its large field; every record has an `id` too."""

    name: str
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]
    payload: str
    highest: int
    rows_per_file: int

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(list(self.layout))

    def files(self, num_bytes: int) -> int:
        """How many source files make about `num_bytes`: an even number, so that two processes share alike."""
        return max(2, num_bytes // (2 * self.rows_per_file * self.dtype.itemsize) * 2)


KINDS = {
    "image": Kind("image", (("id", "<i8", ()), ("image", "u1", (3, 64, 64)), ("label", "<i8", ())), "image", 256, 64),
    "token": Kind("token", (("id", "<i8", ()), ("tokens", "<i4", (128,))), "tokens", 50257, 2048),
}


def make_source(folder: Path, kind: Kind, num_files: int) -> int:
    """Write the source files. Returns the checksum of their records."""
    folder.mkdir(parents=True)
    total = 0
    for number in range(num_files):
        rows = _rows(kind, number)
        rows.tofile(folder / f"{number:05d}.bin")
        total += checksum(columns(rows))
    return total % 2**64


def _rows(kind: Kind, number: int) -> Array:
    random = np.random.default_rng([SEED, number])
    rows = np.zeros(kind.rows_per_file, dtype=kind.dtype)
    rows["id"] = np.arange(number * kind.rows_per_file, (number + 1) * kind.rows_per_file)
    rows[kind.payload] = random.integers(0, kind.highest, rows[kind.payload].shape)
    if "label" in columns(rows):
        rows["label"] = random.integers(0, 1000, len(rows))
    return rows


def source_files(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.bin"))


def read_file(path: str | Path, kind: Kind) -> dict[str, Array]:
    """The columns of one source file."""
    return columns(np.fromfile(path, dtype=kind.dtype))


def columns(rows: Array) -> dict[str, Array]:
    return {name: rows[name] for name in rows.dtype.names or ()}


def samples(table: Mapping[str, Array]) -> Iterator[dict[str, Any]]:
    """The records of a file, one by one."""
    names = list(table)
    for values in zip(*table.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def checksum(batch: Batch) -> int:
    """A digest of a batch's samples that does not depend on their order."""
    fields = [np.ascontiguousarray(batch[name]) for name in sorted(batch)]
    flat = [field.reshape(len(field), -1).view(np.uint8) for field in fields]
    return sum(zlib.crc32(row) for row in np.concatenate(flat, axis=1))


def rebatch(tables: Iterator[Batch], size: int) -> Iterator[Batch]:
    """Tables of any length as batches of `size`, each with memory of its own."""
    rest: dict[str, Array] = {}
    for table in tables:
        joined = {name: np.concatenate([rest[name], column]) for name, column in table.items()} if rest else table
        num_rows = len(joined["id"])
        whole = num_rows - num_rows % size
        for start in range(0, whole, size):
            yield {name: column[start : start + size].copy() for name, column in joined.items()}
        rest = {name: column[whole:] for name, column in joined.items()}
    if len(rest.get("id", ())):
        yield rest
