"""What front and replica send one another: numbered frames, each a head in JSON and a body of bytes."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import orjson

from training.errors import DamagedError

SIZES = struct.Struct("!QIQ")
"""Number, bytes of the head, bytes of the body."""
MAX_FRAME_BYTES = 1 << 30


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
    """Raises `asyncio.IncompleteReadError` at the end, `DamagedError` for what is no frame."""
    number, head, body = _sizes(await reader.readexactly(SIZES.size))
    return _frame(number, await reader.readexactly(head + body), head)


def receive(stream: BinaryIO) -> Frame | None:
    """The next frame; None at the end, or if the rest of it will never come. Raises `DamagedError` for what is none."""
    sizes = stream.read(SIZES.size)
    if len(sizes) < SIZES.size:
        return None
    number, head, body = _sizes(sizes)
    told = stream.read(head + body)
    if len(told) < head + body:
        return None
    return _frame(number, told, head)


def _sizes(data: bytes) -> tuple[int, int, int]:
    number, head, body = SIZES.unpack(data)
    if head + body > MAX_FRAME_BYTES:
        raise DamagedError(f"a frame says that it has {head + body} bytes; the most are {MAX_FRAME_BYTES}")
    return number, head, body


def _frame(number: int, told: bytes, num_head_bytes: int) -> Frame:
    try:
        head = orjson.loads(told[:num_head_bytes])
    except orjson.JSONDecodeError as error:
        raise DamagedError(f"a frame is damaged: {error}") from error
    if not isinstance(head, dict):
        raise DamagedError("a frame is damaged: its head is no document")
    return Frame(number, head, told[num_head_bytes:])
