"""Namespaces of a test's own: networks, processes and mounts that this machine's own know nothing of.

One idle process holds them, and ends when its standard input does. So whatever ends the test, were it `kill -9`, ends
every process inside, and with the last of them the kernel takes the network away.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

import psutil
import pytest

T = TypeVar("T")
NEW_NET, NEW_PID = 0x40000000, 0x20000000  # CLONE_NEWNET, CLONE_NEWPID
UNSHARE = ("unshare", "--net", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
HOLD = ("env", "--ignore-signal=CHLD", "sh", "-c", "echo ready; exec cat")  # so orphans inside leave no zombies
COMMANDS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "iptables": "iptables",
}


class Namespace:
    """A network with nothing but loopback, and a place for processes that see one another only."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen([*UNSHARE, *HOLD], stdin=pipe, stdout=pipe, stderr=pipe)
        _, said, complaints = self._pipes()
        assert said.readline() == b"ready\n", complaints.read().decode()
        (self._init,) = psutil.Process(self._holder.pid).children()
        self._id = _pid_namespace(self._init.pid)
        self._started: list[subprocess.Popen[str]] = []
        self._starter = ThreadPoolExecutor(1, initializer=_enter, initargs=(self._path("pid"), NEW_PID))

    @property
    def pid(self) -> int:
        """Of the process that holds the namespaces."""
        return self._init.pid

    def start(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """A process inside, with this process's environment and `env`; a child of this process like any other.

        All are started by one thread that lives as long as the namespace: who asked to be killed with its parent is
        killed when that thread ends.
        """
        enter = ("nsenter", f"--net={self._path('net')}", f"--mount={self._path('mnt')}")
        there = ("env", f"--chdir={cwd or os.getcwd()}", "--", *command)
        options = {"env": {**os.environ, **(env or {})}, "text": True, "stdin": subprocess.DEVNULL, **options}
        process = self._starter.submit(_popen, [*enter, *there], options).result()
        self._started.append(process)
        return process

    def execute(self, command: Sequence[str], *, given: str = "") -> str:
        """What a command prints, run to its end in this network by itself; `given` is its standard input."""
        enter = ("nsenter", f"--net={self._path('net')}", *command)
        done = subprocess.run(enter, input=given, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}\n{given}"
        return done.stdout

    def inside(self, make: Callable[[], T]) -> T:
        """What `make` returns, called in this network: a socket stays in the network that it was made in."""
        with ThreadPoolExecutor(1, initializer=self.enter_network) as thread:  # it ends, and need not find back
            return thread.submit(make).result()

    def enter_network(self) -> None:
        """Moves the calling thread, and for good."""
        _enter(self._path("net"), NEW_NET)

    def listen(self, address: str) -> socket.socket:
        """A listening socket on any free port."""
        return self.inside(lambda: socket.create_server((address, 0), backlog=128))

    def processes(self) -> list[psutil.Process]:
        """Those inside that run (or are stopped), without the one that holds the namespace."""
        return [process for process in _all_in(self._id) if process.pid != self.pid]

    def kill_all(self) -> None:
        """All processes inside at once, before any can start another."""
        self.start(["sh", "-c", "kill -KILL -1 2> /dev/null"]).wait(timeout=120)
        self._reap()

    def close(self) -> None:
        """Kill all that is inside, with the namespaces."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._init.kill()
        self._reap()  # the holder's end waits for this
        self._holder.wait(timeout=120)
        for pipe in self._pipes():
            pipe.close()
        self._starter.shutdown()

    def _reap(self) -> None:
        for process in self._started:
            process.wait(timeout=120)

    def _pipes(self) -> Sequence[IO[bytes]]:
        return [pipe for pipe in (self._holder.stdin, self._holder.stdout, self._holder.stderr) if pipe is not None]

    def _path(self, kind: str) -> str:
        return f"/proc/{self.pid}/ns/{kind}"


def _popen(command: Sequence[str], options: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, **options)


def _enter(path: str, kind: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as file:
        if libc.setns(file.fileno(), kind) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _pid_namespace(pid: int) -> str:
    with contextlib.suppress(OSError):  # it ended
        return os.readlink(f"/proc/{pid}/ns/pid")
    return ""


def _all_in(namespace: str) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        if _pid_namespace(pid) == namespace:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    yield process


@functools.cache
def why_not() -> str | None:
    """Why this machine can hold no hosts of a test's own; None if it can."""
    missing = [f"{name} (package {package})" for name, package in COMMANDS.items() if shutil.which(name) is None]
    if missing:
        return f"no command {', '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    done = subprocess.run([*UNSHARE, "iptables", "-t", "mangle", "-S"], capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode != 0 else None


def require_namespaces() -> None:
    """Skips the test, with the reason, where there can be none."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
