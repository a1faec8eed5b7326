"""The front's side of one replica: the process, the connection to it, and what it was asked and has not answered."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from asyncio.subprocess import Process
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tasks.serving.frames import Frame, packed, read_frame
from training.errors import DamagedError, InfrastructureError

GO_SECONDS = 5.0
"""To end by itself in, once its connection is closed."""


class ReplicaGoneError(InfrastructureError):
    """It died before its answer was whole."""


@dataclass(frozen=True)
class Asked:
    """A question that is not answered yet."""

    answer: asyncio.Future[Frame]
    since: float
    patience_seconds: float


class Link:
    """Made by `start`. `ready` holds the identities of the programs that the replica has loaded."""

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.ready: set[str] = set()
        self.gone = asyncio.Event()
        self._reader = reader
        self._writer = writer
        self._asked: dict[int, Asked] = {}
        self._number = 0
        self._heard = time.monotonic()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls) -> Link:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "tasks.serving.replica", str(theirs.fileno()), str(os.getpid())),
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        return cls(process, reader, writer)

    @property
    def num_asked(self) -> int:
        return len(self._asked)

    async def ask(self, head: dict[str, Any], body: bytes = b"", *, patience_seconds: float) -> Frame:
        """Its answer. Raises `ReplicaGoneError` if none comes."""
        if self.gone.is_set():
            raise ReplicaGoneError("the replica has ended")
        self._number = number = self._number + 1
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._asked[number] = Asked(answer, time.monotonic(), patience_seconds)
        self._writer.write(packed(number, head, body))
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    def tell(self, head: dict[str, Any]) -> None:
        """What needs no answer."""
        if not self.gone.is_set():
            self._writer.write(packed(0, head))

    def is_stuck(self, now: float) -> bool:
        """Whether it has said nothing for longer than somebody who asked is patient (`now` is monotonic)."""
        return any(now - max(asked.since, self._heard) > asked.patience_seconds for asked in self._asked.values())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()

    async def end(self) -> int:
        """Make sure that the process has ended, too. Returns its exit code."""
        self.kill()
        return await self.process.wait()

    async def close(self) -> None:
        """Have it end; it has answered all that it will."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), GO_SECONDS)
        except TimeoutError:
            await self.end()
        await self._reading

    async def _read(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, DamagedError):
            while True:
                frame = await read_frame(self._reader)
                self._heard = time.monotonic()
                asked = self._asked.get(frame.number)
                if asked is not None and not asked.answer.done():  # else whoever asked has gone
                    asked.answer.set_result(frame)
        self.gone.set()
        self._writer.close()
        for asked in self._asked.values():
            if not asked.answer.done():
                asked.answer.set_exception(ReplicaGoneError("the replica ended before its answer was whole"))
