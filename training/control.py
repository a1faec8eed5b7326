"""What an agent tells its workers on the way, and what they tell it: JSON lines on a socket between the two."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from training.documents import canonical_json, parse

EXIT_STOPPED = 10
"""A worker that was told to stop, and left what it holds in memory."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """stop: now. regroup: with all ranks, after the step they are in. preempt: likewise, with a checkpoint before."""

    do: Literal["stop", "regroup", "preempt"]
    seconds: float = 0.0
    """How long a preempted worker may take for its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """began: training goes on after `step`. step: it was finished. beat: the process is alive, whatever its main thread
    does. failed: why the worker ends."""

    event: Literal["began", "step", "beat", "failed"]
    step: int = 0
    is_waiting: bool = False
    """Of a beat: the main thread waits for other ranks."""
    class_name: str = ""
    message: str = ""


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, message: Order | Note) -> None:
        """Raises `OSError` if the other end is gone."""
        with self._sending:
            self.end.sendall(canonical_json(asdict(message)) + b"\n")

    def orders(self) -> Iterator[Order]:
        """Wait for some, and give them. Raises `EOFError` once the agent is gone."""
        for line in self._lines():
            yield parse(Order, json.loads(line))

    def notes(self) -> Iterator[Note]:
        """Those that have come. Raises `EOFError` once the worker is gone."""
        for line in self._lines():
            yield parse(Note, json.loads(line))

    def _lines(self) -> Iterator[bytes]:
        data = self.end.recv(1 << 16)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from lines
