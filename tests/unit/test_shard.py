"""The shard format: the same bytes for ever, readable by others, and damage that is always an error with a name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.shard import Ragged, decode_shard, dtype_is_known, encode_shard
from training.errors import DamagedError

GOLDEN_FILE = Path(__file__).parents[1] / "golden" / "shard-format-1.safetensors"
GOLDEN_SHA256 = "feda2721f0958c91d7126a231030cd1b30b3550d35687e670b60ed0ddfc05168"
IDS = ["a.csv:1#0", "b/ü.csv:2#0", ""]
FIELDS: dict[str, np.ndarray[Any, Any]] = {
    "pixels": np.arange(12, dtype=np.uint8).reshape(3, 2, 2),
    "label": np.array([7, -1, 2**40], dtype=np.int64),
    "weight": np.array([0.5, -0.0, np.inf], dtype=np.float32),
    "flag": np.array([True, False, True]),
}
DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


def test_round_trip() -> None:
    shard = decode_shard(encode_shard(IDS, FIELDS), name="x")
    columns = shard.columns
    assert shard.ids == IDS
    assert set(columns) == set(FIELDS)
    for name, column in FIELDS.items():
        found = columns[name]
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (column.dtype, column.shape)
        assert found.tobytes() == column.tobytes()


def test_rows_of_different_length() -> None:
    rows = [np.arange(3, dtype=np.int16), np.zeros(0, dtype=np.int16), np.arange(5, dtype=np.int16)]
    data = encode_shard(IDS, {**FIELDS, "text": Ragged.stack(rows)})
    shard = decode_shard(data, name="x")
    assert set(shard.columns) == {*FIELDS, "text"}
    assert [shard.columns["text"][row].tolist() for row in range(3)] == [row.tolist() for row in rows]
    assert safetensors.numpy.load(data)["text.ends"].tolist() == [3, 3, 8]


@pytest.mark.parametrize("ends", [[3, 2, 8], [-1, 3, 8], [3, 3, 7], [3, 8]])
def test_wrong_ends_of_rows_are_damage(ends: list[int]) -> None:
    bad = Ragged(np.arange(8, dtype=np.int16), np.array(ends, dtype=np.int64))
    with pytest.raises(DamagedError, match="shard bad"):
        decode_shard(encode_shard(IDS, {"text": bad}), name="bad")


@given(
    rows=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    inner=st.lists(st.integers(1, 3), max_size=3),
    data=st.data(),
)
@settings(derandomize=True, max_examples=100)
def test_round_trip_of_any_dtype_and_shape(rows: int, dtype: str, inner: list[int], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.text(max_size=5), min_size=rows, max_size=rows))
    column = np.arange(rows * int(np.prod(inner)), dtype=np.int64).reshape(rows, *inner).astype(dtype)
    shard = decode_shard(encode_shard(ids, {"x": column}), name="x")
    back = shard.columns["x"]
    assert isinstance(back, np.ndarray)
    assert shard.ids == ids
    assert back.dtype == column.dtype
    assert np.array_equal(back, column)


def test_the_same_samples_give_the_same_bytes_whatever_their_memory_looks_like() -> None:
    once = encode_shard(IDS, FIELDS)
    strange = {name: FIELDS[name] for name in reversed(list(FIELDS))}
    strange["pixels"] = np.asfortranarray(strange["pixels"])
    strange["label"] = strange["label"].astype(">i8")
    assert encode_shard(IDS, strange) == once


def test_any_safetensors_library_reads_it() -> None:
    data = encode_shard(IDS, FIELDS)
    columns = safetensors.numpy.load(data)
    assert {"id.bytes", "id.ends"} < set(columns)
    for name, column in FIELDS.items():
        assert np.array_equal(columns[name], column)


def test_golden_bytes() -> None:
    """If this fails, every dataset would get a new digest: raise FORMAT, and keep reading the old one."""
    data = encode_shard(IDS, FIELDS)
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    assert GOLDEN_FILE.read_bytes() == data
    shard = decode_shard(GOLDEN_FILE.read_bytes(), name="golden")
    assert shard.ids == IDS
    assert [int(value) for value in shard.columns["label"]] == [7, -1, 2**40]


def test_every_truncation_is_damage() -> None:
    data = encode_shard(IDS, FIELDS)
    for length in range(len(data)):
        with pytest.raises(DamagedError, match="shard cut"):
            decode_shard(data[:length], name="cut")


def test_a_flipped_bit_in_the_header_is_never_another_kind_of_error() -> None:
    data = encode_shard(["a"], {"x": np.zeros((1, 2), dtype=np.int16)})
    header_end = 8 + int.from_bytes(data[:8], "little")
    complaints: list[str] = []
    for position in range(header_end):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                decode_shard(bytes(flipped), name="flipped")
            except DamagedError as error:
                complaints.append(str(error))
    assert len(complaints) > 1000
    assert all("shard flipped" in complaint for complaint in complaints)


@pytest.mark.parametrize("header", [b"5", b'"x"', b"[]", b"null", b"{}", b'{"__metadata__":{}}', b'{"__metadata__":5}'])
def test_a_header_that_is_not_ours_is_damage(header: bytes) -> None:
    with pytest.raises(DamagedError, match="shard strange"):
        decode_shard(len(header).to_bytes(8, "little") + header, name="strange")


def test_another_format_number_is_refused_by_name() -> None:
    data = encode_shard(IDS, FIELDS).replace(b"unbroken-shard-1", b"unbroken-shard-2")
    with pytest.raises(DamagedError, match="shard new has another format"):
        decode_shard(data, name="new")


def test_the_header_names_the_format() -> None:
    data = encode_shard(IDS, FIELDS)
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"] == {"format": "unbroken-shard-1"}


@pytest.mark.parametrize("name", DTYPES)
def test_known_dtypes(name: str) -> None:
    assert dtype_is_known(np.dtype(name))


@pytest.mark.parametrize("name", ["complex64", "O", "U5", "datetime64[s]", "uint16"])
def test_unknown_dtypes(name: str) -> None:
    assert not dtype_is_known(np.dtype(name))
