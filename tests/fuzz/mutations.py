"""Damaged, hostile and odd inputs, made from valid ones. One seed, one sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter

from tests.fuzz.pieces import Piece, pieces

NUMBERS = (b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"1.5", b"true", b"null", b'"5"', b"NaN", b"[]", b"{}")
VALUES = (
    *(b"null", b"true", b"false", b"0", b"-1", b"1", b"2", b"7", b"255", b"1.5", b"-0.0", b"1e308", b"5e-324", b"1e3"),
    *(b"1e999", b"-1e999", b"NaN", b"Infinity", b"-Infinity", b"01", b"tru", b"'a'", b""),
    *(b"9" * 30, b"9" * 400, b"-" + b"9" * 400, b"9" * 5000, b"1" + b"0" * 308),
    *(b"2147483648", b"9007199254740993", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809"),
    *(
        b'""',
        b'"a"',
        b'"5"',
        b'"nan"',
        b'"inf"',
        b'"\\ud800"',
        b'"\\u0000"',
        b'"\\ud83d\\ude00"',
        b'"\xf0\x9f\x98\x80"',
    ),
    *(b'"\xff"', b'"../../x"', b'"/etc/passwd"', b'"a\\nb"', b'"\xe2\x80\xae"', b'"' + b"a" * 3000 + b'"'),
    *(b'"' + b"0123456789abcdef" * 4 + b'"', b'"2026-11-27T08:00:00"', b'"\xd9\xa1"', b'"latin-1"', b'"{}"'),
    *(b"[]", b"{}", b"[[]]", b"[null]", b"[1,2]", b"[-1]", b"[0,0,0]", b'["a","b"]', b'[["a",1]]', b'[{"a":1}]'),
    *(b'{"a":1}', b'{"":{}}', b'{"a":{"b":[]}}', b'{"\\ud800":1}', b"[" * 5000, b"[" * 60 + b"]" * 60),
    *(b"[" * depth + b"]" * depth for depth in (300, 900, 940, 970, 980, 990)),
    *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (300, 900, 960, 990)),
)
NAMES = (
    b'"unknown"',
    b'""',
    b'"\\ud800"',
    b'"__class__"',
    b'"\xc3\xbc"',
    b'"nonce"',
    b'"format"',
    b'"a\\u0000"',
    b'"0"',
)
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
    b"[]",
    b'"a"',
    b"0",
    b"\n\n\n",
)
SIZES = (0, 1, 2, 7, 8, 255, 65535, 1 << 16, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
LENGTHS = tuple(
    number.to_bytes(width, order)
    for number in SIZES
    for width in (1, 2, 4, 8)
    for order in ("little", "big")
    if number < 1 << 8 * width
)


def mutants(seeds: Sequence[bytes], *, seed: int, count: int, words: Sequence[bytes] = ()) -> Iterator[bytes]:
    """`count` inputs: the odd ones first, then valid ones with some changes. `words`: what the format has of its own.

    Half of those that are JSON stay so, with other values, names and members; or are damaged then, too.
    """
    rng = random.Random(seed)
    yield from ODD[:count]
    parts = [pieces(one) if one.lstrip()[:1] in (b"{", b"[") else [] for one in seeds]
    texts = [one[piece.start : piece.stop] for one, found in zip(seeds, parts, strict=True) for piece in found]
    texts = sorted({text for text in texts if len(text) <= 2000})
    choices = (*CHANGES, *((_word(words),) * 3 if words else ()), *((_join(seeds),) if len(seeds) > 1 else ()))
    for _ in range(count - len(ODD)):
        number = int(rng.random() * len(seeds))
        data, found = bytearray(seeds[number]), parts[number]
        if found and rng.random() < 0.6:
            change_pieces(rng, data, found, texts)
            if rng.random() < 0.8:
                yield bytes(data)
                continue
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            rng.choice(choices)(rng, data)
        yield bytes(data)


def change_pieces(rng: random.Random, data: bytearray, found: Sequence[Piece], texts: Sequence[bytes]) -> None:
    """One to three pieces that do not overlap; the last first, since each change moves what is behind it."""
    chosen = [rng.choice(found) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    end = len(data) + 1
    for piece in sorted(chosen, key=attrgetter("start"), reverse=True):
        if max(piece.stop, piece.out_stop) <= end:
            _change_piece(rng, data, piece, texts)
            end = min(piece.start, piece.out_start or piece.start)


def _change_piece(rng: random.Random, data: bytearray, piece: Piece, texts: Sequence[bytes]) -> None:
    if piece.kind == "value":
        data[piece.start : piece.stop] = rng.choice(VALUES if rng.random() < 0.7 else texts)
    elif piece.kind == "name":
        names = texts if rng.random() < 0.5 else NAMES
        data[piece.start : piece.stop] = rng.choice(names)
    elif rng.random() < 0.5:
        del data[piece.out_start : piece.out_stop]
    else:
        name, _, _ = bytes(data[piece.start : piece.stop]).partition(b":")
        again = data[piece.start : piece.stop] if rng.random() < 0.5 else name + b":" + rng.choice(VALUES)
        if rng.random() < 0.3:
            again = rng.choice(NAMES) + b":" + rng.choice(VALUES)
        data[piece.stop : piece.stop] = b"," + again


def _place(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = int(rng.random() * (len(data) + 1))
    return start, min(len(data), start + rng.choice((1, 2, 8, 64)))


def _flip(rng: random.Random, data: bytearray) -> None:
    if data:
        data[int(rng.random() * len(data))] ^= 1 << int(rng.random() * 8)


def _overwrite(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    data[start:stop] = rng.randbytes(stop - start)


def _cut(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    del data[start:stop]


def _end(rng: random.Random, data: bytearray) -> None:
    del data[int(rng.random() * (len(data) + 1)) :]


def _repeat(rng: random.Random, data: bytearray) -> None:
    start, stop = _place(rng, data)
    data[stop:stop] = data[start:stop] * rng.choice((1, 2, 40))


def _number(rng: random.Random, data: bytearray) -> None:
    """In the place of one, where there is one."""
    start = int(rng.random() * (len(data) + 1))
    while start < len(data) and not 48 <= data[start] <= 57:
        start += 1
    stop = start
    while stop < len(data) and 48 <= data[stop] <= 57:
        stop += 1
    data[start:stop] = rng.choice(NUMBERS)


def _length(rng: random.Random, data: bytearray) -> None:
    """A number as binary formats have it: at the beginning, or anywhere."""
    number = rng.choice(LENGTHS)
    start = rng.choice((0, 0, 4, 8, 12)) if rng.random() < 0.5 else int(rng.random() * (len(data) + 1))
    data[start : start + len(number)] = number


def _splice(rng: random.Random, data: bytearray) -> None:
    start, _ = _place(rng, data)
    data[start:start] = rng.choice(ODD[1:])[:4096]


def _line(rng: random.Random, data: bytearray) -> None:
    """Taken out, said again, or moved to the end."""
    start = data.rfind(b"\n", 0, int(rng.random() * (len(data) + 1))) + 1
    stop = data.find(b"\n", start) + 1 or len(data)
    line = bytes(data[start:stop])
    if rng.random() < 0.7:
        del data[start:stop]
    if rng.random() < 0.5:
        data += b"\n" + line


Change = Callable[[random.Random, bytearray], None]


def _word(words: Sequence[bytes]) -> Change:
    """In the place of another word, or between two bytes."""

    def change(rng: random.Random, data: bytearray) -> None:
        start, stop = _place(rng, data)
        data[start : stop if rng.random() < 0.5 else start] = rng.choice(words)

    return change


def _join(seeds: Sequence[bytes]) -> Change:
    """Another valid input's end."""

    def change(rng: random.Random, data: bytearray) -> None:
        other = rng.choice(seeds)
        data[int(rng.random() * (len(data) + 1)) :] = other[int(rng.random() * (len(other) + 1)) :]

    return change


CHANGES: tuple[Change, ...] = (
    *(_flip, _flip, _overwrite, _cut, _end, _repeat, _number, _number, _length, _length, _splice, _line),
)
