"""What one process has to say to another: a thread says it, but for what is short and can be said at once. To wake a
thread for each word would be most of what a step of a small model costs."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from training.servers.protocol import Apply, Commit, Decided, Fetch, Held, Message, Pull, Reached, Standing
from training.servers.stale_protocol import Join, Joined, Read
from training.servers.streams import advance, send_all

SHORT = (Apply, Commit, Decided, Fetch, Held, Pull, Reached, Standing, Join, Joined, Read)
"""They hold no parameters."""


class Sender(Protocol):
    """Of one connection: training.servers.streams and training.servers.shared have them."""

    connection: socket.socket

    def send(self, message: Message) -> None:
        """Raises `OSError`."""
        ...

    def as_bytes(self, message: Message) -> Sequence[bytes | memoryview]:
        """As it may go by the socket."""
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
            if self._maybe_sender is not None and self._num_waiting == 0 and isinstance(message, SHORT):
                with suppress(Exception):  # it would wait; or else the thread finds what is wrong, and tells
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


def _said_at_once(sender: Sender, message: Message) -> list[memoryview]:
    """What is left of it. Raises `BlockingIOError` if that is all."""
    views = [memoryview(buffer) for buffer in sender.as_bytes(message) if len(buffer)]
    advance(views, sender.connection.sendmsg(views, (), socket.MSG_DONTWAIT))
    return views
