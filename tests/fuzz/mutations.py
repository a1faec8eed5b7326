"""Damaged, hostile and odd inputs, made from valid ones. One seed, one sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

NUMBERS = (b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"1.5", b"true", b"null", b'"5"', b"NaN", b"[]", b"{}")
ODD = (
    b"",
    b"\0" * 64,
    b"\xff" * 64,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 900 + b"]" * 900,
    b'"\\ud800"',
    b"\xef\xbb\xbf{}",
    b"{}\n",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    b"9" * 100_000,
    b"null",
    b"[1]",
)
LENGTHS = tuple(number.to_bytes(8, "little") for number in (0, 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1))


def mutants(seeds: Sequence[bytes], *, seed: int, count: int) -> Iterator[bytes]:
    """`count` inputs: the odd ones first, then valid ones with one to four changes."""
    rng = random.Random(seed)
    yield from ODD[:count]
    for _ in range(count - len(ODD)):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(CHANGES)(rng, data)
        yield bytes(data)


def _place(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 8, 64)))


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    data[start:stop] = rng.randbytes(stop - start)


def _cut(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    del data[start:stop]


def _end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    data[stop:stop] = data[start:stop] * rng.choice((1, 2, 40))


def _number(rng: random.Random, data: bytearray) -> None:
    """In the place of one, where there is one."""
    digits = [place for place, byte in enumerate(data[:4096]) if 48 <= byte <= 57]
    start = rng.choice(digits) if digits else len(data)
    stop = start
    while stop < len(data) and 48 <= data[stop] <= 57:
        stop += 1
    data[start:stop] = rng.choice(NUMBERS)


def _length(rng: random.Random, data: bytearray) -> None:
    data[:8] = rng.choice(LENGTHS)


def _splice(rng: random.Random, data: bytearray) -> None:
    start, _ = _place(rng, data)
    data[start:start] = rng.choice(ODD[1:])[:4096]


CHANGES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip,
    _flip,
    _overwrite,
    _cut,
    _end,
    _repeat,
    _number,
    _length,
    _splice,
)
