"""What one process has to say to another: whoever has it says it, as far as that can be done at once; a thread says the
rest."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from training.servers.protocol import Message
from training.servers.streams import MAX_BUFFERS, advance, send_all

MAX_AT_ONCE_BYTES = 1 << 20
"""To copy these takes no longer than to wake a thread. What is longer is better said to several at a time."""


class Sender(Protocol):
    """Of one connection: training.servers.streams and training.servers.shared have them."""

    connection: socket.socket

    def send(self, message: Message) -> None:
        """Raises `OSError`."""
        ...

    def maybe_buffers(self, message: Message, *, max_bytes: int) -> Sequence[bytes | memoryview] | None:
        """What is to go by the socket; None if there is more to be done for it, or more than `max_bytes` to copy."""
        ...


class Outbox:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[Message | list[memoryview] | None] = queue.SimpleQueue()
        self._num_waiting = 0
        """And on their way: whoever comes now comes after them."""
        self._maybe_sender: Sender | None = None

    def put(self, message: Message) -> None:
        """Never waits."""
        with self._lock:
            left: Message | list[memoryview] = message
            if self._maybe_sender is not None and self._num_waiting == 0:
                with suppress(Exception):  # the thread finds what is wrong, and tells
                    left = _said_at_once(self._maybe_sender, message)
            if left:
                self._num_waiting += 1
                self._waiting.put(left)

    def end(self) -> None:
        self._waiting.put(None)

    def deliver(self, sender: Sender) -> None:
        """Until the end. Raises `OSError`, and what is wrong with a message."""
        self._maybe_sender = sender
        while (left := self._waiting.get()) is not None:
            if isinstance(left, Message):
                sender.send(left)
            else:
                send_all(sender.connection, left)
            with self._lock:
                self._num_waiting -= 1


def _said_at_once(sender: Sender, message: Message) -> Message | list[memoryview]:
    """What is left of it."""
    maybe_buffers = sender.maybe_buffers(message, max_bytes=MAX_AT_ONCE_BYTES)
    if maybe_buffers is None:
        return message
    views = [memoryview(buffer) for buffer in maybe_buffers if len(buffer)]
    with suppress(BlockingIOError):
        advance(views, sender.connection.sendmsg(views[:MAX_BUFFERS], (), socket.MSG_DONTWAIT))
    return views
