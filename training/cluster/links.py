"""How agents hear one another: TCP connections on which every message proves that its sender knows the run's secret.

A line is a message's digest (HMAC-SHA256 over a key of this connection alone, the direction and the number of the
message) and its JSON. Whoever cannot read the run record cannot speak here, nor repeat what was said.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256

from training.cluster.protocol import Event, Heard, Linked, Status, Unlinked
from training.documents import canonical_json, parse, read_document
from training.errors import UnbrokenError

HANDSHAKE_SECONDS = 5.0
RETRY_SECONDS = 0.5
MAX_LINE_BYTES = 1 << 20
MAX_UNSENT_BYTES = 1 << 20
"""Of a peer that does not listen: statuses beyond are left out, each says all anyhow."""
BROKEN = (
    OSError,
    TimeoutError,
    ValueError,
    KeyError,
    TypeError,
    asyncio.IncompleteReadError,
    asyncio.LimitOverrunError,
    UnbrokenError,
)
"""What a connection may fail with, whatever the other end sends."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an agent listens."""

    node: int
    incarnation: str
    address: str
    port: int
    metrics_port: int = 0
    """0: it serves none."""


class Links:
    """This agent's connections with all others. Tells of them, and of what they say, by events."""

    def __init__(self, incarnation: str, *, secret: str, on_event: Callable[[Event], None]) -> None:
        self._incarnation = incarnation
        self._secret = secret.encode()
        self._on_event = on_event
        self._open: dict[str, list[_Connection]] = {}
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, address: str) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._accept, address, 0, limit=MAX_LINE_BYTES)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def dial(self, places: Mapping[int, Place]) -> None:
        """Keep trying to reach these, by node, and no others."""
        wanted = {place.incarnation: place for place in places.values() if place.incarnation != self._incarnation}
        for incarnation in self._dialing.keys() - wanted.keys():
            self._dialing.pop(incarnation).cancel()
        for incarnation in wanted.keys() - self._dialing.keys():
            self._dialing[incarnation] = asyncio.create_task(self._keep_dialing(wanted[incarnation]))

    def tell(self, status: Status) -> None:
        body = canonical_json(asdict(status))
        for connections in self._open.values():
            connections[-1].send(body)

    def unlink(self, incarnation: str) -> None:
        for connection in self._open.pop(incarnation, []):
            connection.close()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in [*self._dialing.values(), *self._tasks]:
            task.cancel()
        for incarnation in list(self._open):
            self.unlink(incarnation)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._begin(reader, writer, is_caller=False)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_caller: bool) -> None:
        task = asyncio.create_task(self._converse(reader, writer, is_caller=is_caller))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_dialing(self, place: Place) -> None:
        while True:
            if place.incarnation not in self._open:
                with suppress(OSError, TimeoutError):
                    reader, writer = await asyncio.wait_for(
                        asyncio.open_connection(place.address, place.port, limit=MAX_LINE_BYTES), HANDSHAKE_SECONDS
                    )
                    self._begin(reader, writer, is_caller=True)
            await asyncio.sleep(RETRY_SECONDS)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_caller: bool) -> None:
        """From the handshake to the end of a connection."""
        connection = _Connection(reader, writer, self._secret, is_caller=is_caller)
        try:
            peer = await asyncio.wait_for(connection.greet(self._incarnation), HANDSHAKE_SECONDS)
        except BROKEN:
            connection.close()
            return
        self._add(peer, connection)
        try:
            while True:
                self._hear(peer, await connection.receive())
        except BROKEN:
            pass
        finally:
            connection.close()
            self._remove(peer, connection)

    def _hear(self, peer: str, document: dict[str, object]) -> None:
        status = parse(Status, document)
        if status.member.incarnation == peer:
            self._on_event(Heard(status=status))

    def _add(self, peer: str, connection: _Connection) -> None:
        is_first = peer not in self._open
        self._open.setdefault(peer, []).append(connection)
        if is_first:
            self._on_event(Linked(incarnation=peer))

    def _remove(self, peer: str, connection: _Connection) -> None:
        others = [other for other in self._open.get(peer, []) if other is not connection]
        if others:
            self._open[peer] = others
        elif self._open.pop(peer, None):
            self._on_event(Unlinked(incarnation=peer))


class _Connection:
    """One connection: its handshake, and its numbered, proven messages."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, *, is_caller: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._secret = secret
        self._is_caller = is_caller
        self._key = b""
        self._num_sent = self._num_received = 0

    async def greet(self, incarnation: str) -> str:
        """Returns who is at the other end. Raises `ValueError` for somebody who does not know the secret."""
        own = secrets.token_hex(16)
        self._writer.write(json.dumps({"incarnation": incarnation, "nonce": own}).encode() + b"\n")
        hello = read_document(await self._reader.readuntil(b"\n"), what="a greeting")
        peer, theirs = str(hello["incarnation"]), str(hello["nonce"])
        if peer == incarnation:
            raise ValueError("it says what it is told")
        ends = [[incarnation, own], [peer, theirs]]
        self._key = hmac.digest(self._secret, json.dumps(ends if self._is_caller else ends[::-1]).encode(), sha256)
        self.send(b"{}")
        await self.receive()
        return peer

    def send(self, body: bytes) -> None:
        if self._writer.transport.get_write_buffer_size() < MAX_UNSENT_BYTES:
            self._writer.write(self._proof(body, self._num_sent, is_callers=self._is_caller) + b" " + body + b"\n")
            self._num_sent += 1

    async def receive(self) -> dict[str, object]:
        proof, _, body = (await self._reader.readuntil(b"\n"))[:-1].partition(b" ")
        if not hmac.compare_digest(proof, self._proof(body, self._num_received, is_callers=not self._is_caller)):
            raise ValueError("a message that does not prove where it comes from")
        self._num_received += 1
        return read_document(body, what="a message")

    def _proof(self, body: bytes, number: int, *, is_callers: bool) -> bytes:
        text = b"%d %d " % (is_callers, number) + body
        return hmac.new(self._key, text, sha256).hexdigest().encode()

    def close(self) -> None:
        self._writer.close()
