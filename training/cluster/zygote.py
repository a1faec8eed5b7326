"""The agent's side of its zygote: the warm process that workers are forked from, so that no recovery imports torch.

Nothing here imports torch. What the zygote itself does is in forking.py; `python -m training.cluster.zygote` starts it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from training.cluster import forking
from training.config import Preset
from training.errors import InfrastructureError

ANSWER_SECONDS = 120.0
"""After which a zygote counts as hung. The slowest answer waits for the recipe's import."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENVIRONMENT = {"RES_OPTIONS": "timeout:1 attempts:1", "THP_MEM_ALLOC_ENABLE": "1"}
"""torch asks for the name of every address that it connects to, only for its log; a name server that is away would
hold up a recovery for five seconds each time.

Large tensors lie in huge pages, where the kernel gives them to who asks: the kernel frees the memory of a killed rank
before anybody hears of its death, and huge ones sooner (benchmarks.recovery.pages)."""
NUM_TRIES = 3


class _GoneError(Exception):
    """The zygote is dead, and so are its workers."""


class Worker:
    """A process that the zygote forked. To be used by its zygote's thread."""

    def __init__(self, process: _Process, number: str, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._process = process
        self._number = number
        self._pidfd = pidfd
        self._maybe_code: int | None = None
        weakref.finalize(self, os.close, pidfd)

    def fileno(self) -> int:
        """Readable once the worker has ended, as its pidfd is; open for as long as this object is there."""
        return self._pidfd

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that killed it; None while it runs."""
        if self._maybe_code is None and _is_readable(self._pidfd, 0):
            self._maybe_code = self._process.exit_code(self._number)
        return self._maybe_code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once there is one. Raises `TimeoutError`."""
        if not _is_readable(self._pidfd, timeout):
            raise TimeoutError(f"worker {self.pid} still runs after {timeout} s")
        code = self.poll()
        assert code is not None
        return code

    def kill(self) -> None:
        """Through the pidfd: never another process that was given the same pid."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class Zygote:
    """Starts workers for one preset. To be used by one thread, which must live as long as the workers shall.

    `entry` is what a worker runs: `module:function`, from an order to an exit code.
    """

    def __init__(self, preset: Preset, *, entry: str = f"{forking.WORKER_MODULE}:run") -> None:
        self._entry = entry
        self._folder = preset.folder
        self._maybe_recipe: str | None = preset.recipe
        self._maybe_process: _Process | None = None

    @property
    def pid(self) -> int | None:
        return self._maybe_process.pid if self._maybe_process is not None else None

    def prepare(self) -> None:
        """Begin to import, and do not wait: `start` will."""
        if self._maybe_process is None or self._maybe_process.is_gone():
            self._maybe_process = _Process(self._entry, self._maybe_recipe, self._folder)

    def is_ready(self) -> bool:
        """Whether `start` would fork at once."""
        return self._maybe_process is not None and self._maybe_process.look_for_readiness()

    def start(self, order: Mapping[str, Any], fds: Mapping[str, int | Sequence[int]]) -> Worker:
        """Fork a worker. It finds the descriptors, as they are numbered there, in its order under their names.

        A new zygote is made if the old one died. Raises `InfrastructureError` if there can be none.
        """
        for _ in range(NUM_TRIES):
            self.prepare()
            assert self._maybe_process is not None
            try:
                return self._maybe_process.start(order, fds)
            except _GoneError:
                if not self._maybe_process.is_ready:  # the recipe's import may have ended it
                    self._maybe_recipe = None
        raise InfrastructureError(f"the process that forks workers died {NUM_TRIES} times in a row")

    def close(self) -> None:
        """End the zygote, and with it all its workers."""
        if self._maybe_process is not None:
            self._maybe_process.end()


class _Process:
    """One zygote process, and what it has told so far."""

    def __init__(self, entry: str, maybe_recipe: str | None, folder: str) -> None:
        self.is_ready = False
        self._num_orders = 0
        self._forked: dict[str, tuple[int, int]] = {}
        self._codes: dict[str, int] = {}
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = _popen(
                forking.Plan(
                    socket_fd=theirs.fileno(),
                    agent_pid=os.getpid(),
                    entry=entry,
                    recipe=maybe_recipe,
                    folder=folder,
                )
            )
        self.end = weakref.finalize(self, _end, self._popen, self._socket)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def is_gone(self) -> bool:
        return not self.end.alive or self._popen.poll() is not None

    def look_for_readiness(self) -> bool:
        with suppress(_GoneError):
            while self.end.alive and _is_readable(self._socket.fileno(), 0):
                self._receive(ANSWER_SECONDS)
        return self.is_ready and not self.is_gone()

    def start(self, order: Mapping[str, Any], fds: Mapping[str, int | Sequence[int]]) -> Worker:
        self._num_orders += 1
        number = str(self._num_orders)
        self._send(number, order, fds)
        deadline = time.monotonic() + ANSWER_SECONDS
        while number not in self._forked:
            self._receive(deadline - time.monotonic())
        return Worker(self, number, *self._forked.pop(number))

    def exit_code(self, number: str) -> int:
        """Of a worker that has ended. If the zygote died, nobody knows more than that it took the worker along."""
        deadline = time.monotonic() + ANSWER_SECONDS
        try:
            while number not in self._codes:
                self._receive(deadline - time.monotonic())
        except _GoneError:
            return -signal.SIGKILL
        return self._codes.pop(number)

    def _send(self, number: str, order: Mapping[str, Any], fds: Mapping[str, int | Sequence[int]]) -> None:
        order_fd = forking.document_fd(order)
        handed, places = [order_fd], dict[str, int | list[int]]()
        for name, value in fds.items():
            first = len(handed)
            handed.extend([value] if isinstance(value, int) else value)
            places[name] = first if isinstance(value, int) else list(range(first, len(handed)))
        message = json.dumps({"number": number, "places": places}).encode()
        try:
            socket.send_fds(self._socket, [message], handed)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._gone() from error
        finally:
            os.close(order_fd)

    def _receive(self, timeout_seconds: float) -> None:
        """Take in one message. Raises `_GoneError` if there will be none, `InfrastructureError` if it is a refusal."""
        if not self.end.alive or not _is_readable(self._socket.fileno(), max(0.0, timeout_seconds)):
            raise self._gone()
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, forking.MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        self._note(json.loads(data), fds)

    def _note(self, message: Mapping[str, Any], fds: list[int]) -> None:
        match message["kind"]:
            case "ready":
                self.is_ready = True
            case "forked":
                self._forked[message["number"]] = (message["pid"], fds[0])
            case "ended":
                self._codes[message["number"]] = message["code"]
            case "failed":
                raise InfrastructureError(f"no worker could be forked: {message['reason']}")
            case "refused":
                raise InfrastructureError(f"no worker can be forked here: {message['reason']}")

    def _gone(self) -> _GoneError:
        self.end()
        return _GoneError()


def _popen(plan: forking.Plan) -> subprocess.Popen[bytes]:
    """Start the process. Signals to the whole group must not end it: they are blocked from its first instruction on."""
    plan_fd = forking.document_fd(asdict(plan))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, forking.STOP_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", forking.MODULE, str(plan_fd)],
            stdin=subprocess.DEVNULL,
            env={**ENVIRONMENT, **os.environ, **ONE_THREAD},
            pass_fds=(plan.socket_fd, plan_fd),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(plan_fd)


def _end(popen: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    popen.kill()
    popen.wait()


def _is_readable(fd: int, timeout_seconds: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_seconds is None else timeout_seconds * 1000))


if __name__ == "__main__":
    forking.main()
