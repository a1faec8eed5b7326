"""Canonical JSON, the digests that name things, and typed reading of our own documents."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import xxhash

from training.errors import DamagedError, UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
MAX_DEPTH = 100
"""Of what is read: what is done with it afterwards often goes down as deep, and Python ends at some hundreds."""
MAX_DIGITS = 20
"""Of a whole number: each of ours fits into 64 bits."""
END_OF_TIME = 253402300800.0
"""In seconds since 1970: the year 10000, in which calendars end."""


def canonical_json(value: Any) -> bytes:
    """One byte string for one value: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(*pieces: bytes | bytearray | memoryview) -> str:
    """The digest that names an object, of its bytes whole or in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 over the canonical JSON of `value`."""
    return sha256_hex(canonical_json(value))


def sealed(name: str, document: Any) -> bytes:
    """A document under its name, with its own digest: for objects whose key says what went in, not what came out."""
    return canonical_json({name: document, "sha256": digest_of(document)})


def unsealed(name: str, data: bytes) -> Any:
    """The inverse. Raises `DamagedError` if that is not what this is."""
    found = read_document(data, what=f"a {name}")
    document = found.get(name)
    if digest_of(document) != found.get("sha256"):
        raise DamagedError(f"a {name} is damaged")
    return document


def read_json(data: bytes | str, *, what: str) -> Any:
    """What JSON that was stored, or sent, says: however deep or odd it is, it is this or a `DamagedError`.

    It is at most `MAX_DEPTH` deep, says each name once, its numbers are finite, and its whole ones have at most
    `MAX_DIGITS` digits.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole, object_pairs_hook=_once_each
        )
        if text.count("[") + text.count("{") > MAX_DEPTH:
            require_shallow(value)
        if "\\u" in text:
            canonical_json(value)  # half of a surrogate pair can be said in JSON, and written nowhere
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} is damaged: it is no JSON that this project writes ({error})") from error
    return value


def read_document(data: bytes | str, *, what: str) -> dict[str, Any]:
    """The same of a JSON object. Raises `DamagedError`."""
    value = read_json(data, what=what)
    if not isinstance(value, dict):
        raise DamagedError(f"{what} is damaged: it holds no JSON document")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """A file of settings, at most `MAX_DEPTH` deep. Raises `UserError` naming it if it is none, or cannot be read."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
        require_shallow(value)
        return value
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error


def require_shallow(value: Any) -> None:
    """Raises `ValueError` for tables and lists more than `MAX_DEPTH` deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is deeper than {MAX_DEPTH} levels")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):  # of two, one reader may take the first, and another the last
        raise ValueError("it says a name twice")
    return made


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{text[:MAX_DIGITS]}… is too large")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def fast_digest(*pieces: bytes | memoryview) -> str:
    """xxh3-128: the reader's check against damage (17 GB/s, where sha256 does 1.6)."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def parse(kind: type[T], document: Any) -> T:
    """Make the dataclass `kind`, nested ones included, from a JSON document that this project wrote: a number in quotes
    is none.

    Raises `DamagedError` naming the field that is not as it should be.
    """
    from pydantic import ValidationError

    try:
        made: T = _adapter(cast(Any, kind)).validate_json(canonical_json(document), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"a stored {kind.__name__} is damaged: {where}: {first['msg']}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"a stored {kind.__name__} is damaged: {error}") from error
    return made


def prepare_to_parse(*kinds: type) -> None:
    """What the first `parse` of each would do first."""
    for kind in kinds:
        _adapter(kind)


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
