"""Canonical JSON and the typed reading of our own documents."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from training.documents import canonical_json, digest_of, fast_digest, parse, read_json, read_toml, sha256_hex
from training.errors import DamagedError, UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    number: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...]
    name: str | None = None


def test_one_value_has_one_byte_string() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "ü"}) == '{"a":"ü","b":[1,2.5,null]}'.encode()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"loss": float("nan")})


def test_digests_are_the_published_ones() -> None:
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert fast_digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert sha256_hex(memoryview(b"abc")) == sha256_hex(b"abc")


def test_parse_makes_nested_dataclasses_and_passes_over_other_keys() -> None:
    assert parse(Outer, {"inner": [{"number": 1}, {"number": 2}], "nonce": "x"}) == Outer(
        inner=(Inner(number=1), Inner(number=2))
    )


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"inner": [{"number": 1}, {}]}, "inner.1.number"),
        ({"inner": [{"number": "1"}]}, "inner.0.number"),
        ({"inner": [], "name": 5}, "name"),
        ({}, "inner"),
        ({"inner": math.inf}, "Out of range float"),
    ],
)
def test_parse_names_the_damaged_field(document: object, field: str) -> None:
    with pytest.raises(DamagedError, match=rf"a stored Outer is damaged: {field}"):
        parse(Outer, document)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[" * 101 + b"]" * 101, "deeper than 100 levels"),
        (b'{"a":' * 400 + b"1" + b"}" * 400, "deeper than 100 levels"),
        (b"[" * 100_000, "recursion depth"),
        (b"9" * 21, "99999… is too large"),
        (b"-" + b"9" * 5000, "is too large"),
        (b"1e999", "is too large"),
        (b"NaN", "is no JSON"),
        (b'[{"a": 1, "a": 2}]', "says a name twice"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b"\xff", "can't decode"),
    ],
)
def test_json_that_nobody_here_writes_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(DamagedError, match=reason):
        read_json(text, what="it")


def test_json_as_deep_and_as_large_as_it_may_be_is_read() -> None:
    assert read_json(b"[" * 100 + b"]" * 100 + b"\n", what="it")
    assert read_json(f"[{2**64 - 1}, {-(2**63)}]", what="it") == [2**64 - 1, -(2**63)]
    assert read_json(json.dumps([[]] * 1000), what="it") == [[]] * 1000, "wide is not deep"


@pytest.mark.parametrize(
    "text", [b"a = " + b"[" * 5000, b"a = " + b"9" * 5000, b"a = \xff", b"a", b"a = 1979-13-45", b"a." * 200 + b"a = 1"]
)
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"a\.toml: not valid TOML"):
        read_toml(path)


def test_a_file_that_is_away_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.toml cannot be read: No such file"):
        read_toml(tmp_path / "a.toml")
