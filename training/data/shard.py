"""The shard format: one safetensors file (columns of samples), written by us so that its bytes never change.

Readable without this project by any safetensors library: https://github.com/huggingface/safetensors#format
A field whose rows differ in length lies in two columns, `NAME.ragged` (the rows end to end) and `NAME.ends`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from training import tensorfile
from training.errors import DamagedError

FORMAT = 1
ID_BYTES = "id.bytes"
ID_ENDS = "id.ends"
RAGGED = ".ragged"
ENDS = ".ends"
POWERS_OF_TEN = 10 ** np.arange(1, 19)
Array = np.ndarray[Any, Any]

_DTYPES = {known: np.dtype(name) for name, known in tensorfile.DTYPES.items() if name != "bfloat16"}

DTYPE_NAMES = ", ".join(dtype.name for dtype in _DTYPES.values())


@dataclass(frozen=True)
class Ragged:
    """A column whose rows differ in length: row i is `flat[ends[i - 1]:ends[i]]`, of shape [any, …]."""

    flat: Array
    ends: Array

    @staticmethod
    def stack(rows: Sequence[Array]) -> Ragged:
        return Ragged(np.concatenate(rows), np.cumsum([len(row) for row in rows], dtype=np.int64))

    @staticmethod
    def join(parts: Sequence[Ragged]) -> Ragged:
        """The rows of several, one after another."""
        lengths = np.concatenate([np.diff(part.ends, prepend=0) for part in parts])
        return Ragged(np.concatenate([part.flat for part in parts]), np.cumsum(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> Array:
        return self.flat[self.ends[row - 1] if row else 0 : self.ends[row]]


Column = Array | Ragged
Columns = Mapping[str, Column]


@dataclass(frozen=True)
class Shard:
    """A decoded shard: views into its bytes, nothing copied."""

    id_rows: Ragged
    columns: Columns

    def __len__(self) -> int:
        return len(self.id_rows)

    def id_of(self, row: int) -> str:
        text, ends = self._id_text
        return text[ends[row] : ends[row + 1]].decode()

    @property
    def ids(self) -> list[str]:
        return [self.id_of(row) for row in range(len(self))]

    @cached_property
    def _id_text(self) -> tuple[bytes, list[int]]:
        """As Python's own objects: many times quicker to slice than arrays."""
        return self.id_rows.flat.tobytes(), [0, *self.id_rows.ends.tolist()]


def dtype_is_known(dtype: np.dtype[Any]) -> bool:
    """Whether a sample's field may have this dtype."""
    return tensorfile.DTYPES.get(dtype.name) in _DTYPES


def id_column(ids: Iterable[str]) -> Ragged:
    """The samples' ids as they lie in a shard."""
    encoded = [*map(str.encode, ids)]
    return Ragged(np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([*map(len, encoded)], dtype=np.int64))


def numbered_ids(prefix: str, numbers: range) -> Ragged:
    """The same of a prefix followed by each number, ten times quicker."""
    text = (prefix + prefix.join(map(str, numbers))).encode()
    lengths = len(prefix.encode()) + num_digits(np.arange(numbers.start, numbers.stop))
    return Ragged(np.frombuffer(text, np.uint8), np.cumsum(lengths))


def num_digits(numbers: Array) -> Array:
    """How long each of these is in decimal; none is negative."""
    return np.searchsorted(POWERS_OF_TEN, numbers, side="right") + 1


def encode_shard(ids: Sequence[str] | Ragged, fields: Columns) -> bytes:
    """Pack columns (each of length [samples]) and the samples' ids. The same input gives the same bytes."""
    return b"".join(shard_pieces(ids, fields))


def shard_pieces(ids: Sequence[str] | Ragged, fields: Columns) -> list[bytes | memoryview]:
    """The same, not joined: a header and views of the columns."""
    id_rows = ids if isinstance(ids, Ragged) else id_column(ids)
    columns: dict[str, Array] = {ID_BYTES: id_rows.flat, ID_ENDS: id_rows.ends}
    for name, field in fields.items():
        if isinstance(field, Ragged):
            columns |= {name + RAGGED: field.flat, name + ENDS: field.ends}
        else:
            columns[name] = field
    return _safetensors_pieces(columns)


def _safetensors_pieces(columns: Mapping[str, Array]) -> list[bytes | memoryview]:
    whole = {name: np.ascontiguousarray(columns[name]) for name in sorted(columns)}
    bodies = [c.astype(c.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8).data for c in whole.values()]
    about = [(name, column.dtype.name, columns[name].shape, column.nbytes) for name, column in whole.items()]
    return [tensorfile.header(about, __metadata__={"format": f"unbroken-shard-{FORMAT}"}), *bodies]


def decode_shard(data: bytes | memoryview, *, name: str) -> Shard:
    """The inverse of `encode_shard`. Raises `DamagedError` naming the shard."""
    view = memoryview(data)
    try:
        length = int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8 : 8 + length]))
        if header.pop("__metadata__")["format"] != f"unbroken-shard-{FORMAT}":
            raise DamagedError(f"shard {name} has another format than {FORMAT}: it needs another release")
        arrays = {key: _array(view, 8 + length, entry) for key, entry in header.items()}
        ids = _ragged(arrays.pop(ID_BYTES), arrays.pop(ID_ENDS))
        columns = dict(_columns(arrays))
        if any(len(column) != len(ids) for column in columns.values()):
            raise ValueError("its columns differ in length")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"shard {name} is damaged: {error}") from error
    return Shard(ids, columns)


def _columns(arrays: Mapping[str, Array]) -> Iterable[tuple[str, Column]]:
    for key, array in arrays.items():
        if key.endswith(RAGGED):
            name = key.removesuffix(RAGGED)
            yield name, _ragged(array, arrays[name + ENDS])
        elif not key.endswith(ENDS):
            yield key, array


def _ragged(flat: Array, ends: Array) -> Ragged:
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] != len(flat)):
        raise ValueError("the ends of its rows are not in order")
    return Ragged(flat, ends)


def _array(view: memoryview, base: int, entry: Mapping[str, Any]) -> Array:
    start, end = entry["data_offsets"]
    flat = np.frombuffer(view[base + start : base + end], dtype=_DTYPES[entry["dtype"]])
    return flat.reshape(entry["shape"])
