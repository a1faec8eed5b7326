"""Canonical JSON and the typed reading of our own documents."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from training.documents import canonical_json, digest_of, fast_digest, parse, sha256_hex
from training.errors import DamagedError


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
    [({"inner": [{"number": 1}, {}]}, "inner.1.number"), ({"inner": [], "name": 5}, "name"), ({}, "inner")],
)
def test_parse_names_the_damaged_field(document: object, field: str) -> None:
    with pytest.raises(DamagedError, match=rf"a stored Outer is damaged: {field}:"):
        parse(Outer, document)
