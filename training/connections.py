"""The connections of a group of ranks, to be cut from another thread: gloo's own `abort` ends no collective."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class Connections:
    """The sockets that were opened inside of `opening`."""

    def __init__(self) -> None:
        self._inodes: dict[int, int] = {}

    @contextmanager
    def opening(self) -> Iterator[None]:
        """No other thread may open one meanwhile."""
        before = _sockets()
        self._inodes = {}
        yield
        self._inodes = {fd: inode for fd, inode in _sockets().items() if before.get(fd) != inode}

    def cut(self) -> None:
        """Whoever waits at either end is told at once that the other is gone."""
        for fd, inode in self._inodes.items():
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as own:  # it may be closed by now
                is_same = os.fstat(own.fileno()).st_ino == inode  # else the number was given to another file
                if is_same and not own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):  # gloo dies with a listener
                    own.shutdown(socket.SHUT_RDWR)


def _sockets() -> dict[int, int]:
    """Inodes by descriptor, of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found
