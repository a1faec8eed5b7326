"""Tables of samples: a dataset cannot tell whether a recipe gave its samples singly or many at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data_source import data_config, local_source, tiny_line
from tests.unit.tiny import Tiny
from training.data.builder import ShardBuilder, Spares
from training.data.manifest import Manifest
from training.data.shard import Array, encode_shard
from training.data.withdrawn import content_of_samples
from training.data.writer import write_dataset
from training.errors import UserError
from training.recipe import Record, Sample, Table
from training.s3.objectstore import Store

RAGGED = frozenset({"text"})
Given = Sample | Table


def table_of(num_rows: int, text_bytes: int, *, seed: int) -> Table:
    random = np.random.default_rng(seed)
    return Table(
        {
            "x": random.integers(0, 1000, (3, num_rows), dtype=np.int32).T,  # rows that do not lie together
            "label": random.integers(0, 1000, num_rows).astype(">i8" if seed % 2 else "<i8"),
            "text": random.integers(0, 256, (num_rows, text_bytes), dtype=np.uint8),
        }
    )


def one_by_one(table: Table) -> list[Sample]:
    return [{name: column[row] for name, column in table.columns.items()} for row in range(len(table))]


def shards(records: Mapping[str, Sequence[Given]], shard_bytes: int) -> list[bytes]:
    builder = ShardBuilder("train", shard_bytes, {}, RAGGED, Spares())
    full = [full for record, samples in records.items() for full in builder.add(record, samples)]
    full += [] if builder.is_empty else [builder.take()]
    return [encode_shard(shard.ids, shard.columns) for shard in full]


PIECES = st.lists(st.tuples(st.booleans(), st.integers(0, 130), st.integers(0, 5)), max_size=4)


@given(pieces=st.dictionaries(st.sampled_from(["a", "ü/b.csv:12", ""]), PIECES), shard_bytes=st.integers(1, 5000))
@settings(max_examples=60)
def test_the_same_shards_however_samples_are_given(
    pieces: Mapping[str, Sequence[tuple[bool, int, int]]], shard_bytes: int
) -> None:
    singly: dict[str, list[Given]] = {}
    mixed: dict[str, list[Given]] = {}
    for record, made in pieces.items():
        tables = [table_of(num_rows, text_bytes, seed=seed) for seed, (_, num_rows, text_bytes) in enumerate(made)]
        singly[record] = [sample for table in tables for sample in one_by_one(table)]
        mixed[record] = []
        for table, (is_table, _, _) in zip(tables, made, strict=True):
            mixed[record] += [table] if is_table else one_by_one(table)
    assert shards(mixed, shard_bytes) == shards(singly, shard_bytes)
    assert [content_of_samples(samples) for samples in mixed.values()] == [
        content_of_samples(samples) for samples in singly.values()
    ]


@dataclass(frozen=True, kw_only=True)
class Repeating(Tiny):
    """A record gives 40 samples, in the way that `_given` says; all from one array that is used again."""

    def encode(self, record: Record) -> Iterable[Given]:
        (sample,) = super().encode(record)
        columns: dict[str, Array] = {name: np.repeat(array[None], 20, axis=0) for name, array in sample.items()}
        for _ in range(2):
            columns["x"] += np.arange(20)[:, None]
            yield from self._given(Table(columns))

    def _given(self, table: Table) -> Iterable[Given]:
        return one_by_one(table)


class Tabling(Repeating):
    def _given(self, table: Table) -> Iterable[Given]:
        return (table,)


def write(store: Store, folder: Path, recipe: Tiny, **options: Any) -> Manifest:
    config = data_config()
    return write_dataset(store, local_source(folder, config), config, recipe, **options).manifest


def two_files(folder: Path) -> None:
    (folder / "raw").mkdir()
    for file in range(2):
        (folder / f"raw/{file}.csv").write_text("".join(f"{tiny_line(60 * file + line)}\n" for line in range(12)))


def test_the_same_version_of_a_dataset_however_samples_are_given(store: Store, tmp_path: Path) -> None:
    two_files(tmp_path)
    assert write(store, tmp_path, Tabling()).digest == write(store, tmp_path, Repeating()).digest


def test_withdrawn_records_are_found_in_tables_too(store: Store, tmp_path: Path) -> None:
    """By id and by content; and the others stay as they were, though the recipe uses its arrays again."""
    two_files(tmp_path)
    by_content = content_of_samples(Repeating().encode(Record(id="", data=tiny_line(3).encode())))
    withdrawn = {"1.csv:7": (), "gone.csv:1": (by_content,)}
    digests = {write(store, tmp_path, recipe, withdrawn=withdrawn).digest for recipe in (Tabling(), Repeating())}
    for file, line in ((0, 3), (1, 6)):
        path = tmp_path / f"raw/{file}.csv"
        path.write_text(path.read_text().replace(f"{tiny_line(60 * file + line)}\n", "\n"))
    assert digests == {write(store, tmp_path, Repeating()).digest}


def test_a_recipe_may_return_its_table(store: Store, tmp_path: Path) -> None:
    class Returning(Tiny):
        def encode(self, record: Record) -> Iterable[Sample]:
            (sample,) = super().encode(record)
            return Table({name: array[None] for name, array in sample.items()})

    two_files(tmp_path)
    assert write(store, tmp_path, Returning()).digest == write(store, tmp_path, Tiny()).digest


NO_TABLES: dict[str, tuple[Any, str]] = {
    "no arrays by name": ([1, 2], r"cannot read record 0\.csv:1: ValueError: a Table is of arrays by name, not \[1"),
    "no columns": ({}, "a Table is of arrays by name, not {}"),
    "list": ({"x": [1.0]}, "a Table's column 'x' is a list, not a numpy array"),
    "number": ({"x": np.float64(7)}, "a Table's column 'x' is a float64, not a numpy array"),
    "no rows": ({"x": np.array(7)}, r"column 'x' has dtype int64 and shape \(\): no rows"),
    "objects": ({"x": np.array([b"a", None])}, "column 'x' has dtype object"),
    "masked": ({"x": np.ma.masked_array([1.0, 2.0], mask=[False, True])}, "column 'x' is masked"),
    "lengths": ({"x": np.zeros(2), "y": np.zeros(3)}, "a Table's columns differ in length: {'x': 2, 'y': 3}"),
    "dtype": ({"x": np.zeros(2, np.complex64)}, r"record 0\.csv:1#0: field 'x' has dtype complex64"),
    "number as a name": ({1: np.zeros(2)}, r"record 0\.csv:1#0: field 1 is a float64"),
    "reserved name": ({"__metadata__": np.zeros(2)}, r"record 0\.csv:1#0: field '__metadata__' must have another name"),
    "nothing in it": ({"x": np.zeros((2, 3, 0))}, r"record 0\.csv:1#0: field 'x' has shape \[3, 0\]: nothing is in it"),
    "ragged without a length": ({"text": np.zeros(2)}, r"record 0\.csv:1#0: field 'text' .* has no length"),
}


@dataclass(frozen=True, kw_only=True)
class Careless(Tiny):
    gives: str
    ragged = RAGGED

    def encode(self, record: Record) -> Iterable[Given]:
        yield Table(cast(Any, NO_TABLES[self.gives][0]))


@pytest.mark.parametrize("gives", NO_TABLES)
def test_what_is_no_table_is_named_by_its_record(store: Store, tmp_path: Path, gives: str) -> None:
    two_files(tmp_path)
    with pytest.raises(UserError, match=NO_TABLES[gives][1]):
        write(store, tmp_path, Careless(gives=gives))


@pytest.mark.parametrize("changed", [{"x": np.zeros((2, 4))}, {"x": np.zeros((2, 3), np.int8)}, {"y": np.zeros(2)}])
def test_a_table_with_other_fields_than_before_is_named_by_its_first_sample(changed: Mapping[str, Array]) -> None:
    builder = ShardBuilder("train", 1000, {}, (), Spares())
    with pytest.raises(UserError, match=r"record a#2: its fields are not those of the records before: field"):
        list(builder.add("a", [Table({"x": np.zeros((2, 3))}), Table(changed)]))
