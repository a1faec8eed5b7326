"""Messages between two processes of one host: a Unix socket carries heads, and the bytes of tensors lie in memory that
both have.

Such memory is a memfd: it has no name, and is gone with the last process that has it. A *segment* holds one message at
a time; its descriptor goes by the socket once. The sender writes into one that is free, and only then sends the head:
so what is cut short is never heard of. The receiver's tensors lie in the segment, not copied; once the last of them is
gone, the segment's first byte says that it is free.
"""

from __future__ import annotations

import mmap
import os
import socket
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from training.errors import DamagedError
from training.servers.protocol import Copy, Message, Values
from training.servers.streams import read_into, send_all
from training.servers.wire import decode, encode

MIN_SHARED_BYTES = 1 << 15
"""Fewer go by the socket, as do snapshots."""
NUMBER_BYTES = 8
BY_SOCKET = 0
"""In the place of a segment's number."""
START_BYTES = 64
"""Of a segment, before the tensors."""
FREE, IN_USE = 0, 1
MAP_FLAGS = mmap.MAP_SHARED | mmap.MAP_POPULATE
"""All pages at once: one by one, as they are touched, takes several times as long."""
NUM_SIZES_PER_DOUBLING = 8
"""Of segments, so that a slightly longer message may find one."""


class Segment:
    """As the sender has it."""

    def __init__(self, number: int, num_bytes: int) -> None:
        """With room for so many. Raises `OSError`."""
        self.number = number
        self.num_bytes = rounded(START_BYTES + num_bytes)
        self._descriptor = os.memfd_create("unbroken-message")
        os.ftruncate(self._descriptor, self.num_bytes)
        self._memory = mmap.mmap(self._descriptor, self.num_bytes, flags=MAP_FLAGS)
        self._bytes = np.frombuffer(self._memory, np.uint8)

    def is_free_for(self, num_bytes: int) -> bool:
        return self._memory[0] == FREE and START_BYTES + num_bytes <= self.num_bytes

    def fill(self, buffers: Sequence[memoryview]) -> None:
        self._memory[0] = IN_USE
        start = START_BYTES
        for buffer in filter(len, buffers):  # memcpy, during which other threads go on
            np.copyto(self._bytes[start : start + len(buffer)], np.frombuffer(buffer, np.uint8))
            start += len(buffer)

    def hand_over(self, connection: socket.socket, announced: Sequence[bytes]) -> None:
        """For good: the receiver maps it, and nobody else needs the descriptor. Raises `OSError`."""
        try:
            send_all(connection, announced, [self._descriptor])
        finally:
            os.close(self._descriptor)


def rounded(num_bytes: int) -> int:
    """Up to one of few sizes, of whole pages."""
    step = max(mmap.PAGESIZE, 1 << (num_bytes.bit_length() - NUM_SIZES_PER_DOUBLING.bit_length()))
    return -(-num_bytes // step) * step


class SharedSender:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._segments: list[Segment] = []

    def send(self, message: Message) -> None:
        """Raises `OSError`."""
        head, buffers = encode(message)
        maybe_buffers = self._maybe_buffers(message, head, buffers)
        if maybe_buffers is not None:
            send_all(self.connection, maybe_buffers)
            return
        segment = Segment(len(self._segments) + 1, sum(map(len, buffers)))
        segment.fill(buffers)
        self._segments.append(segment)
        segment.hand_over(self.connection, [_as_bytes(segment.number), head])

    def maybe_buffers(self, message: Message, *, max_bytes: int) -> Sequence[bytes | memoryview] | None:
        head, buffers = encode(message)
        return self._maybe_buffers(message, head, buffers) if sum(map(len, buffers)) <= max_bytes else None

    def _maybe_buffers(
        self, message: Message, head: bytes, buffers: Sequence[memoryview]
    ) -> Sequence[bytes | memoryview] | None:
        """What goes by the socket; None if there is no segment yet for the rest."""
        num_bytes = sum(map(len, buffers))
        if num_bytes < MIN_SHARED_BYTES or _is_rare(message):
            return [_as_bytes(BY_SOCKET), head, *buffers]
        maybe_free = min(
            (segment for segment in self._segments if segment.is_free_for(num_bytes)),
            key=lambda segment: segment.num_bytes,
            default=None,
        )
        if maybe_free is None:
            return None
        maybe_free.fill(buffers)
        return [_as_bytes(maybe_free.number), head]


class SharedReceiver:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._segments: dict[int, mmap.mmap] = {}

    def receive(self, *, max_bytes: int) -> Message:
        """Raises `OSError` at the end, `DamagedError` for what is no message."""
        number = self._read_number()

        def read(view: memoryview) -> None:
            read_into(self._connection, view)

        if number == BY_SOCKET:
            return decode(read, max_bytes=max_bytes)
        return decode(read, lambda num_bytes: self._body(number, num_bytes), max_bytes=max_bytes)

    def _read_number(self) -> int:
        """And map the segment that comes along."""
        data = b""
        while len(data) < NUMBER_BYTES:
            part, descriptors, _, _ = socket.recv_fds(
                self._connection, NUMBER_BYTES - len(data), 1, socket.MSG_CMSG_CLOEXEC
            )
            for descriptor in descriptors:
                self._map(descriptor)
            if not part:
                raise ConnectionError("the peer closed the connection")
            data += part
        return int.from_bytes(data, "little")

    def _map(self, descriptor: int) -> None:
        """They are numbered as they come. Raises `DamagedError`."""
        try:
            num_bytes = os.fstat(descriptor).st_size
            self._segments[len(self._segments) + 1] = mmap.mmap(descriptor, num_bytes, flags=MAP_FLAGS)
        except ValueError as error:
            raise DamagedError(f"a segment that cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)

    def _body(self, number: int, num_bytes: int) -> Tensor:
        maybe_memory = self._segments.get(number)
        if maybe_memory is None or START_BYTES + num_bytes > len(maybe_memory):
            raise DamagedError(f"a message of {num_bytes} bytes in segment {number}, where they are not")
        found = np.frombuffer(maybe_memory, np.uint8, num_bytes, START_BYTES)
        weakref.finalize(found, _free, maybe_memory).atexit = False
        return torch.from_numpy(found)


def _is_rare(message: Message) -> bool:
    """And large: a segment for it would be of no use for what comes in each step, and would stay."""
    return isinstance(message, Copy) or (isinstance(message, Values) and isinstance(message.values, Mapping))


def _as_bytes(number: int) -> bytes:
    return number.to_bytes(NUMBER_BYTES, "little")


def _free(memory: mmap.mmap) -> None:
    memory[0] = FREE
