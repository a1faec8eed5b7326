"""What an agent tells its workers on the way, and what they tell it: JSON lines on a socket between the two."""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from training.documents import canonical_json, parse
from training.runs.record import Record

EXIT_STOPPED = 10
"""A worker that was told to stop, and left what it holds in memory."""
MAX_DESCRIPTORS = 8


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which rank of the group of `token` a process is."""

    rank: int
    local_rank: int
    world_size: int
    token: int


@dataclass(frozen=True, kw_only=True)
class Call:
    """To a seat in a group, which finds itself at this store."""

    seat: Seat
    record: Record
    """The run's, as the group began."""
    store_address: str
    store_port: int
    is_host: bool = False
    """The store is this process's to serve, on the socket that comes with the call."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """join: the group of `maybe_call`. stop: now. regroup: with all ranks, after the step they are in. preempt:
    likewise, with a checkpoint before."""

    do: Literal["join", "stop", "regroup", "preempt"]
    seconds: float = 0.0
    """How long a preempted worker may take for its checkpoint."""
    maybe_call: Call | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    """began: training goes on after `step`. step: it was finished. beat: the process is alive, whatever its main thread
    does, and once a second what it has counted. left: it is in no group any more, and waits to be called to another.
    failed: why the worker ends."""

    event: Literal["began", "step", "beat", "left", "failed"]
    step: int = 0
    is_waiting: bool = False
    """Of a beat: the main thread waits for other ranks."""
    figures: dict[str, float] | None = None
    """Of a beat: training.runs.figures."""
    class_name: str = ""
    message: str = ""
    records: tuple[str, ...] = ()
    """Of a failure: those that cause it, each by itself."""


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.descriptors: deque[int] = deque()
        """Those that came along, for whoever takes the order that they belong to."""
        self._rest = b""
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self.end.fileno()

    def send(self, message: Order | Note, *descriptors: int) -> None:
        """Raises `OSError` if the other end is gone."""
        data = canonical_json(asdict(message)) + b"\n"
        with self._sending:
            sent = socket.send_fds(self.end, [data], descriptors) if descriptors else 0
            self.end.sendall(data[sent:])

    def orders(self) -> Iterator[Order]:
        """Wait for some, and give them. Raises `EOFError` once the agent is gone."""
        for line in self._lines():
            yield parse(Order, json.loads(line))

    def notes(self) -> Iterator[Note]:
        """Those that have come. Raises `EOFError` once the worker is gone."""
        for line in self._lines():
            yield parse(Note, json.loads(line))

    def _lines(self) -> Iterator[bytes]:
        data, descriptors, _, _ = socket.recv_fds(self.end, 1 << 16, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise EOFError
        self.descriptors.extend(descriptors)
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from lines
