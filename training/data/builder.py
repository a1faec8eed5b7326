"""Samples to the columns of a shard, and where one shard ends and the next begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from training.data.manifest import FieldInfo, Split, difference
from training.data.shard import DTYPE_NAMES, Array, Column, Ragged, dtype_is_known, id_column, num_digits, numbered_ids
from training.errors import UserError
from training.recipe import Recipe, Record, Sample, Table

Given = Sample | Table
"""What a recipe's `encode` gives."""
ARRAYS = (np.ndarray, np.generic)
MASKED = np.ma.MaskedArray
ALIGNMENT = 64
MAPPINGS = (dict, Mapping)  # a dict is known sooner as such


class FullShard(NamedTuple):
    """What makes a shard."""

    split: Split
    ids: Ragged
    columns: Mapping[str, Column]
    memory: Array
    """What holds the columns of fixed rows: to be given back to the `Spares` it is from."""


class Spares:
    """Memory of shards that are sent, for the next ones: fresh pages cost more than to copy into them."""

    def __init__(self) -> None:
        self._spares: deque[Array] = deque()

    def take(self, num_bytes: int) -> Array:
        with suppress(IndexError):
            if len(spare := self._spares.pop()) >= num_bytes:
                return spare
        return np.empty(num_bytes, np.uint8)

    def give(self, memory: Array) -> None:
        self._spares.append(memory)


class ShardBuilder:
    """Collects samples until they fill a shard. Boundaries depend on the samples alone."""

    def __init__(
        self,
        split: Split,
        shard_bytes: int,
        fields: dict[str, FieldInfo],
        ragged: Collection[str],
        spares: Spares,
    ) -> None:
        """`fields` is shared by a partition's builders, and filled from the first sample."""
        self._split = split
        self._shard_bytes = shard_bytes
        self._fields = fields
        self._ragged = ragged
        self._spares = spares
        self._alike: dict[str, tuple[np.dtype[Any], tuple[int | None, ...]]] = {}
        self._clear()

    def _clear(self) -> None:
        self._num_rows = 0
        self._num_bytes = self._fixed_bytes = 0
        self._ids: list[str] = []
        self._id_columns: list[Ragged] = []
        self._memory = np.empty(0, np.uint8)
        self._columns: dict[str, Array] = {}
        self._rows: dict[str, list[Array]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._num_rows

    def add(self, record: str, samples: Iterable[Given]) -> Iterator[FullShard]:
        """Take a record's samples, and give each shard that they fill.

        All is copied at once: a recipe may write its next sample into the same arrays.
        """
        number = 0
        for given in samples:
            if isinstance(given, Table):
                yield from self._add_table(f"{record}#", number, given)
                number += len(given)
            else:
                self._add_sample(f"{record}#{number}", given)
                number += 1
                if self._num_bytes >= self._shard_bytes:
                    yield self.take()

    def _add_sample(self, sample_id: str, sample: Sample) -> None:
        self._prepare(sample_id, sample)
        row = self._num_rows
        for name, column in self._columns.items():
            column[row] = sample[name]
        for name, rows in self._rows.items():
            rows.append(sample[name].copy())
            self._num_bytes += rows[-1].nbytes
        self._ids.append(sample_id)
        self._num_bytes += self._fixed_bytes + len(sample_id)
        self._num_rows += 1

    def _add_table(self, prefix: str, number: int, table: Table) -> Iterator[FullShard]:
        """As if its rows came one by one, the first with this number."""
        start = 0
        while start < len(table):
            self._prepare(f"{prefix}{number + start}", table.row(start))
            stop = self._add_rows(prefix, number, table, start)
            start = stop
            if self._num_bytes >= self._shard_bytes:
                yield self.take()

    def _add_rows(self, prefix: str, number: int, table: Table, start: int) -> int:
        """Those that the shard has room for, and the one that fills it. Gives where they stop."""
        row_bytes = self._fixed_bytes + sum(table.columns[name][start].nbytes for name in self._rows) + len(prefix)
        missing = self._shard_bytes - self._num_bytes
        candidates = np.arange(start, min(len(table), start + missing // (row_bytes + 1) + 1))
        filled = np.cumsum(row_bytes + num_digits(number + candidates))
        num_rows = min(len(candidates), int(np.searchsorted(filled, missing)) + 1)
        stop = start + num_rows
        for name, column in self._columns.items():
            column[self._num_rows : self._num_rows + num_rows] = table.columns[name][start:stop]
        for name, rows in self._rows.items():
            rows.extend(table.columns[name][start:stop].copy())
        self._close_ids()
        self._id_columns.append(numbered_ids(prefix, range(number + start, number + stop)))
        self._num_bytes += int(filled[num_rows - 1])
        self._num_rows += num_rows
        return stop

    def _close_ids(self) -> None:
        if self._ids:
            self._id_columns.append(id_column(self._ids))
            self._ids = []

    def take(self) -> FullShard:
        self._close_ids()
        columns: dict[str, Column] = {name: column[: self._num_rows] for name, column in self._columns.items()}
        columns |= {name: Ragged.stack(rows) for name, rows in self._rows.items()}
        full = FullShard(self._split, Ragged.join(self._id_columns), columns, self._memory)
        self._clear()
        return full

    def _prepare(self, sample_id: str, sample: Sample) -> None:
        """Raises `UserError` unless it is a sample with the fields of those before."""
        if not isinstance(sample, MAPPINGS):
            raise UserError(f"record {sample_id}: encode() must give dicts of numpy arrays, not {type(sample)}")
        if not sample:
            raise UserError(f"record {sample_id}: encode() gives a sample without any field")
        if not self._is_alike(sample):
            self._require_same_fields(sample_id, sample)
        if not self._num_rows:
            self._allocate()

    def _allocate(self) -> None:
        """Columns for as many rows as a shard can have; memory that no row comes to is never touched."""
        fixed = {name: field for name, field in self._fields.items() if name not in self._ragged}
        row_types = {name: np.dtype((field.dtype, field.shape)) for name, field in fixed.items()}
        self._fixed_bytes = sum(row_type.itemsize for row_type in row_types.values())
        num_rows = self._shard_bytes // (self._fixed_bytes + len("#0")) + 1
        sizes = [-(-num_rows * row_type.itemsize // ALIGNMENT) * ALIGNMENT for row_type in row_types.values()]
        self._memory = self._spares.take(sum(sizes))
        starts = accumulate(sizes, initial=0)
        self._columns = {
            name: np.frombuffer(self._memory, row_type, num_rows, start)
            for (name, row_type), start in zip(row_types.items(), starts, strict=False)
        }
        self._rows = {name: [] for name in self._fields if name in self._ragged}

    def _is_alike(self, sample: Sample) -> bool:
        """Whether its arrays are like those before: to ask is ten times quicker than to describe them."""
        for name, (dtype, shape) in self._alike.items():
            array = sample.get(name)
            if not isinstance(array, ARRAYS) or array.dtype != dtype or isinstance(array, MASKED):
                return False
            if array.shape != shape and self._shape_of(name, array) != shape:
                return False
        return len(sample) == len(self._alike)

    def _shape_of(self, name: str, array: Array) -> tuple[int | None, ...]:
        return (None, *array.shape[1:]) if name in self._ragged and array.ndim else array.shape

    def _require_same_fields(self, sample_id: str, sample: Sample) -> None:
        fields = {name: self._declared(sample_id, name, array) for name, array in sample.items()}
        if not self._fields:
            self._fields.update(fields)
        if told := difference(fields, self._fields):
            raise UserError(f"record {sample_id}: its fields are not those of the records before: {told}")
        self._alike = {name: (array.dtype, fields[name].shape) for name, array in sample.items()}

    def _declared(self, sample_id: str, name: str, array: Array) -> FieldInfo:
        if not isinstance(name, str) or not isinstance(array, ARRAYS):
            raise UserError(f"record {sample_id}: field {name!r} is a {type(array).__name__}, not a numpy array")
        if isinstance(array, MASKED):
            raise UserError(
                f"record {sample_id}: field {name!r} is masked, and a mask is not kept: fill it, or give both"
            )
        if not dtype_is_known(array.dtype):
            raise UserError(f"record {sample_id}: field {name!r} has dtype {array.dtype}, not one of {DTYPE_NAMES}")
        if not name or "." in name or name == "__metadata__":
            raise UserError(f"record {sample_id}: field {name!r} must have another name, without a dot")
        if name in self._ragged and array.ndim == 0:
            raise UserError(f"record {sample_id}: field {name!r} is in the recipe's `ragged`, but has no length")
        if 0 in array.shape[name in self._ragged :]:
            raise UserError(f"record {sample_id}: field {name!r} has shape {list(array.shape)}: nothing is in it")
        return FieldInfo(dtype=array.dtype.name, shape=self._shape_of(name, array))


def encoded(recipe: Recipe, record: Record) -> Iterator[Given]:
    """What a recipe makes of a record. Raises `UserError` naming it."""
    try:
        given = recipe.encode(record)
        yield from (given,) if isinstance(given, Table) else given
    except UserError:
        raise
    except Exception as error:  # the recipe's own code: whatever it raises, the record is the place to look
        raise UserError(f"cannot read record {record.id}: {type(error).__name__}: {error}") from error


def kept(given: Given) -> Given:
    """A copy: a recipe may write its next sample into the same arrays."""
    if isinstance(given, Table):
        return Table({name: column.copy() for name, column in given.columns.items()})
    return {name: copy(array) for name, array in given.items()} if isinstance(given, MAPPINGS) else given
