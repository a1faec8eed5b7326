"""Messages on a socket between two hosts: sent from where their tensors lie, received in memory that is used again."""

from __future__ import annotations

import socket
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from training.servers.protocol import Message
from training.servers.wire import decode, encode

MAX_BUFFERS = 512
"""That one call of the kernel takes."""
MAX_KEPT = 4
"""Pieces of memory, to be used again."""


class StreamSender:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def send(self, message: Message) -> None:
        """Raises `OSError`."""
        head, buffers = encode(message)
        send_all(self.connection, [head, *buffers])

    def maybe_buffers(self, message: Message, *, max_bytes: int) -> Sequence[bytes | memoryview] | None:
        head, buffers = encode(message)
        return [head, *buffers] if sum(map(len, buffers)) <= max_bytes else None


class StreamReceiver:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pool = Pool()

    def receive(self, *, max_bytes: int) -> Message:
        """Raises `OSError` at the end, `DamagedError` for what is no message."""
        return decode(self._read, self._read_body, max_bytes=max_bytes)

    def _read(self, view: memoryview) -> None:
        read_into(self._connection, view)

    def _read_body(self, num_bytes: int) -> Tensor:
        place = self._pool.take(num_bytes)
        self._read(place.data)
        return torch.from_numpy(place)


class Pool:
    """Memory that comes back once the last tensor in it is gone: in new pages, to receive takes twice as long."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray[tuple[int], np.dtype[np.uint8]]] = deque(maxlen=MAX_KEPT)

    def take(self, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        whole = self._maybe_found(num_bytes)
        if whole is None:
            whole = np.empty(num_bytes, np.uint8)
        place = whole[:]
        weakref.finalize(place, self._free.append, whole).atexit = False
        return place

    def _maybe_found(self, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]] | None:
        for _ in range(len(self._free)):
            whole = self._free.popleft()
            if len(whole) == num_bytes:
                return whole
            self._free.append(whole)
        return None


def send_all(connection: socket.socket, buffers: Sequence[bytes | memoryview], descriptors: Sequence[int] = ()) -> None:
    """The descriptors go with the first byte."""
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    if descriptors:
        advance(views, socket.send_fds(connection, views[:MAX_BUFFERS], list(descriptors)))
    while views:
        advance(views, connection.sendmsg(views[:MAX_BUFFERS]))


def advance(views: list[memoryview], num_sent: int) -> None:
    """Leave what has not been sent."""
    while views and num_sent >= len(views[0]):
        num_sent -= len(views.pop(0))
    if num_sent:
        views[0] = views[0][num_sent:]


def read_into(connection: socket.socket, view: memoryview) -> None:
    """Raises `ConnectionError` at the end."""
    while len(view):
        num_bytes = connection.recv_into(view)
        if num_bytes == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[num_bytes:]
