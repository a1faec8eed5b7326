"""Whether a process is in a group: one thread leaves it and awaits the next, another may have to end the process."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from training.control import Call


class Attendance:
    """Of one process. Between a `call` and the next `leave` it is in a group, or on its way into it."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Call, int | None]] = SimpleQueue()
        self._is_out = threading.Event()
        self._is_out.set()
        self._deciding = threading.Lock()

    def call(self, call: Call, maybe_listener: int | None) -> None:
        """To a group; with the descriptor of the socket for its store, if that is this process's."""
        self._is_out.clear()
        self._calls.put((call, maybe_listener))

    @property
    def is_in(self) -> bool:
        return not self._is_out.is_set()

    def next_call(self) -> tuple[Call, int | None]:
        """Wait for it."""
        return self._calls.get()

    def leave(self) -> None:
        """It is in no group any more. Does not return if it was decided that the process must end."""
        with self._deciding:
            self._is_out.set()

    def must_end(self, patience_seconds: float) -> bool:
        """Whether it does not leave by itself within that time: then it does not leave any more."""
        if self._is_out.wait(patience_seconds):
            return False
        self._deciding.acquire()
        if self._is_out.is_set():  # in the last moment
            self._deciding.release()
            return False
        return True
