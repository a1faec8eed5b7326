"""What front and replica send one another: numbered frames, each a head in JSON and a body of bytes."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

SIZES = struct.Struct("!QIQ")
"""Number, bytes of the head, bytes of the body."""


@dataclass(frozen=True)
class Frame:
    """An answer has the number of what it answers."""

    number: int
    head: dict[str, Any]
    body: bytes


def packed(number: int, head: dict[str, Any], body: bytes = b"") -> bytes:
    told = orjson.dumps(head)
    return b"".join((SIZES.pack(number, len(told), len(body)), told, body))


async def read_frame(reader: asyncio.StreamReader) -> Frame:
    """Raises `asyncio.IncompleteReadError` at the end."""
    number, head, body = SIZES.unpack(await reader.readexactly(SIZES.size))
    told = await reader.readexactly(head + body)
    return Frame(number, orjson.loads(told[:head]), told[head:])


def receive(stream: BinaryIO) -> Frame | None:
    """The next frame; None at the end, or if the rest of it will never come."""
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    number, head, body = SIZES.unpack(sizes)
    told = stream.read(head + body)
    if len(told) < head + body:
        return None
    return Frame(number, orjson.loads(told[:head]), told[head:])
