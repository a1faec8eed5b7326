"""Where in a text of JSON its values, names and members lie, so that a change of one leaves JSON."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


@dataclass(frozen=True)
class Piece:
    """Bytes [start, stop) of a text. A member is a pair of an object or an item of an array; what to take out with it
    is its comma."""

    kind: Literal["value", "name", "member"]
    start: int
    stop: int
    out_start: int = 0
    out_stop: int = 0


def pieces(text: bytes) -> list[Piece]:
    """Of all documents that follow one another in a text (lines of JSON, say); none of what is no JSON."""
    found: list[Piece] = []
    tokens = [(match.start(), match.end()) for match in _TOKEN.finditer(text)]
    place = 0
    while place < len(tokens):
        place = _value(text, tokens, place, found)
    return found


def _value(text: bytes, tokens: list[tuple[int, int]], place: int, found: list[Piece]) -> int:
    """Notes the value that begins at token `place`; returns the place after it."""
    start, stop = tokens[place]
    closing = {b"{": b"}", b"[": b"]"}.get(text[start:stop])
    place += 1
    if closing is not None:
        members: list[tuple[int, int]] = []
        while place < len(tokens) and text[slice(*tokens[place])] != closing:
            place = _member(text, tokens, place, found, members)
        _note_members(members, found)
        stop = tokens[min(place, len(tokens) - 1)][1]
        place += 1
    found.append(Piece("value", start, stop))
    return place


def _member(
    text: bytes, tokens: list[tuple[int, int]], place: int, found: list[Piece], members: list[tuple[int, int]]
) -> int:
    start = tokens[place][0]
    if place + 1 < len(tokens) and text[slice(*tokens[place + 1])] == b":":
        found.append(Piece("name", *tokens[place]))
        place += 2
    place = _value(text, tokens, place, found)
    members.append((start, tokens[place - 1][1]))
    if place < len(tokens) and text[slice(*tokens[place])] == b",":
        place += 1
    return place


def _note_members(members: list[tuple[int, int]], found: list[Piece]) -> None:
    for number, (start, stop) in enumerate(members):
        out_start = members[number - 1][1] if number else start
        out_stop = stop if number or len(members) == 1 else members[1][0]
        found.append(Piece("member", start, stop, out_start, out_stop))
