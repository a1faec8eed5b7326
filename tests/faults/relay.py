"""A TCP relay that delays, slows down, hangs, refuses, or answers 503, to all its clients or to some.

It may listen in one network and go on in another: so hosts of a test's own reach a store on this machine's loopback.
For replies that are lost after the store acted, put `tests.faults.proxy.LosingProxy` between it and the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

Address: TypeAlias = tuple[str, int]
CHUNK_BYTES = 16 << 10
MAX_CHUNKS_ON_THE_WAY = 256
ORIGINAL_DESTINATION = 80  # SO_ORIGINAL_DST
BODY_503 = b"<Error><Code>SlowDown</Code></Error>"
REPLY_503 = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(BODY_503), BODY_503)
)
EVERYONE = ""


class Trouble(Enum):
    """What a client of a relay meets."""

    REFUSED = "refused"
    """Its connections are reset."""
    HANGING = "hanging"
    """Its connections stand, and nothing goes through; it does when the trouble is over."""
    ANSWERED_503 = "answered 503"


@dataclass(frozen=True, kw_only=True)
class Line:
    """How long the way through a relay is, in each direction."""

    latency_seconds: float = 0.0
    jitter_seconds: float = 0.0
    """At most this much more, at random; the order of the bytes stays."""
    bytes_per_second: float | None = None
    """Per connection."""


class Relay:
    """Passes on what comes to `listener`, to `upstream`, or to where it was going before iptables sent it here (None).

    `enter_network` is called in the thread that makes the connections upstream, which lives as long as the relay.
    """

    def __init__(
        self,
        listener: socket.socket,
        *,
        upstream: Address | None,
        line: Line | None = None,
        enter_network: Callable[[], None] = lambda: None,
    ) -> None:
        self.port: int = listener.getsockname()[1]
        self.line = line or Line()
        self.num_struck: Counter[tuple[str, Trouble]] = Counter()
        """Connections that met a trouble, by client."""
        self.num_bytes_delayed = 0
        self._listener = listener
        self._upstream = upstream
        self._enter_network = enter_network
        self._chance = random.Random(0)
        self._troubles: dict[str, Trouble] = {}
        self._connections: dict[asyncio.Task[None], str] = {}
        self._loop = asyncio.new_event_loop()
        self._is_serving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()
        assert self._is_serving.wait(timeout=120), "the relay did not start"

    def make_trouble(self, trouble: Trouble | None, *, client: str = EVERYONE) -> None:
        """For one client, by address, or for everyone; None ends it. Connections that are open feel it at once."""
        asyncio.run_coroutine_threadsafe(self._change(trouble, client), self._loop).result(timeout=120)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._is_stopped.set())
        self._thread.join(timeout=120)

    def trouble_of(self, client: str) -> Trouble | None:
        return self._troubles.get(client) or self._troubles.get(EVERYONE)

    def _run(self) -> None:
        self._enter_network()
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._is_stopped, self._has_changed = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._handle, sock=self._listener)
        self._is_serving.set()
        await self._is_stopped.wait()
        server.close()
        handlers = list(self._connections)
        for handler in handlers:
            handler.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)

    async def _change(self, trouble: Trouble | None, client: str) -> None:
        self._troubles.pop(client, None)
        if trouble is not None:
            self._troubles[client] = trouble
        self._has_changed.set()
        self._has_changed = asyncio.Event()
        for handler, of in self._connections.items():
            if (met := self.trouble_of(of)) not in (None, Trouble.HANGING):
                self.num_struck[of, met] += 1
                handler.cancel()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection. It is reset unless both sides ended it in due form."""
        client = writer.get_extra_info("peername")[0]
        handler = asyncio.current_task()
        assert handler is not None
        self._connections[handler] = client
        is_over = False
        try:
            with contextlib.suppress(asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
                is_over = await self._meet(self.trouble_of(client), client, reader, writer)
        finally:
            del self._connections[handler]
            if not is_over:
                _reset(writer)
            writer.close()

    async def _meet(
        self, trouble: Trouble | None, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Returns whether the connection is over in due form."""
        if trouble in (Trouble.REFUSED, Trouble.ANSWERED_503):
            self.num_struck[client, trouble] += 1
            if trouble is Trouble.REFUSED:
                return False
            await _answer_503(reader, writer)
        else:
            await self._relay(client, reader, writer)
        return True

    async def _relay(self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream = self._upstream or _original_destination(writer)
        there_reader, there_writer = await asyncio.open_connection(*upstream)
        try:
            there = asyncio.ensure_future(self._pump(client, reader, there_writer))
            back = asyncio.ensure_future(self._pump(client, there_reader, writer))
            try:
                await asyncio.gather(there, back)
            finally:
                there.cancel()
                back.cancel()
        except BaseException:
            _reset(there_writer)
            raise
        finally:
            there_writer.close()

    async def _pump(self, client: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction: what is read is written when it is due."""
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS_ON_THE_WAY)
        arriving = asyncio.ensure_future(self._read(reader, on_the_way))
        try:
            while True:
                due, chunk = await on_the_way.get()
                if (wait_seconds := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait_seconds)
                    self.num_bytes_delayed += len(chunk)
                await self._while_hanging(client, chunk)
                if not chunk:
                    break
                writer.write(chunk)
                await writer.drain()
            await arriving
            writer.write_eof()
        finally:
            arriving.cancel()

    async def _read(self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        due, chunk = 0.0, b"x"
        try:
            while chunk:
                chunk = await reader.read(CHUNK_BYTES)
                line = self.line
                seconds = len(chunk) / line.bytes_per_second if line.bytes_per_second else 0.0
                delay = line.latency_seconds + self._chance.uniform(0, line.jitter_seconds)
                due = max(time.monotonic() + delay, due) + seconds
                await on_the_way.put((due, chunk))
        except OSError:
            await on_the_way.put((due, b""))  # what was read before still arrives
            raise

    async def _while_hanging(self, client: str, chunk: bytes) -> None:
        if chunk and self.trouble_of(client) is Trouble.HANGING:
            self.num_struck[client, Trouble.HANGING] += 1
        while self.trouble_of(client) is Trouble.HANGING:
            await self._has_changed.wait()


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _original_destination(writer: asyncio.StreamWriter) -> Address:
    found = writer.get_extra_info("socket").getsockopt(socket.SOL_IP, ORIGINAL_DESTINATION, 16)
    port, address = struct.unpack("!2xH4s8x", found)
    return socket.inet_ntoa(address), port


async def _answer_503(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """To the request's head; then the rest is read, or the client might be reset before it reads the answer."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(REPLY_503)
    writer.write_eof()
    while await reader.read(CHUNK_BYTES):
        pass
