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
        """What another thread opens meanwhile, to the store say, is cut too, and has to try again."""
        before = _sockets()
        self._inodes = {}
        yield
        self._inodes = {fd: inode for fd, inode in _sockets().items() if before.get(fd) != inode}

    def cut(self) -> None:
        """Whoever waits at either end is told at once that the other is gone."""
        for fd, inode in self._inodes.items():
            if not _is(fd, inode):
                continue  # it is closed, and the number may have been given to another file
            with suppress(OSError), socket.socket(fileno=os.dup(fd)) as own:
                if _is(own.fileno(), inode) and not _listens(own):
                    own.shutdown(socket.SHUT_RDWR)


def _listens(end: socket.socket) -> bool:
    """Gloo ends the process if its listener fails."""
    return bool(end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _is(fd: int, inode: int) -> bool:
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False


def _sockets() -> dict[int, int]:
    """Inodes by descriptor, of this process."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own is closed by now
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found[int(name)] = status.st_ino
    return found
