"""How the processes of one group hear one another: a TCP connection for each direction between two of them.

A connection's order is the order of its messages, and its end is an event: who is told that a peer is lost does not
wait for it. Both ends prove that they know the run's secret, for this token and these names alone; what follows is
trusted, as in a group of gloo.
"""

from __future__ import annotations

import hmac
import logging
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256

from training.documents import canonical_json
from training.errors import DamagedError
from training.servers.protocol import Message, Send
from training.servers.wire import decode, encode

HANDSHAKE_SECONDS = 5.0
ACCEPT_PAUSE_SECONDS = 0.1
NONCE_BYTES = 16
MAX_NAME_BYTES = 256
MAX_BUFFERS = 512
"""That one call of the kernel takes."""

Address = tuple[str, int]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A peer closed its connection, or never could be reached."""

    token: int


class Mesh:
    """`inbox` gets (sender, what it said, or `Lost`). Messages to this process itself come without a copy."""

    def __init__(self, name: str, *, secret: str, address: str, max_bytes: int) -> None:
        self.name = name
        self.inbox: queue.SimpleQueue[tuple[str, Message | Lost]] = queue.SimpleQueue()
        self._secret = secret.encode()
        self._max_bytes = max_bytes
        self._listener = socket.create_server((address, 0))
        self.address: Address = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._is_closed = False
        self._token = 0
        self._places: Mapping[str, Address] = {}
        self._outboxes: dict[str, queue.SimpleQueue[Message | None]] = {}
        self._sockets: dict[socket.socket, int] = {}
        """Of both directions, and the token that each is of."""
        self._start(self._accept)

    def begin(self, token: int, places: Mapping[str, Address]) -> None:
        """Another group, whose members are there. What goes to members of the one before is given up."""
        with self._lock:
            for outbox in self._outboxes.values():
                outbox.put(None)
            self._token, self._places, self._outboxes = token, places, {}
        for connection, of_token in list(self._sockets.items()):
            if of_token < token:  # whoever is stuck in one hears of its end
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def send(self, sends: list[Send]) -> None:
        """In order, for each receiver. Whoever is in no group, or gone, gets nothing."""
        for one in sends:
            if one.to == self.name:
                self.inbox.put((self.name, one.message))
            else:
                self._post(one)

    def _post(self, one: Send) -> None:
        with self._lock:
            if one.message.token != self._token or one.to not in self._places:
                return
            if one.to not in self._outboxes:
                self._outboxes[one.to] = queue.SimpleQueue()
                self._start(self._deliver, one.to, self._places[one.to], self._token, self._outboxes[one.to])
            self._outboxes[one.to].put(one.message)

    def close(self) -> None:
        self._is_closed = True
        self.begin(0, {})
        with self._lock, suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, function: object, *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _deliver(self, to: str, address: Address, token: int, outbox: queue.SimpleQueue[Message | None]) -> None:
        try:
            with socket.create_connection(address, timeout=HANDSHAKE_SECONDS) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._introduce(connection, to, token)
                connection.settimeout(None)
                with self._known(connection, token):
                    while (message := outbox.get()) is not None:
                        _send_all(connection, message)
        except Exception as error:  # also what cannot be encoded: whoever waits for it hears that it will not come
            if not isinstance(error, OSError | DamagedError):
                log.exception("%s could not say something to %s", self.name, to)
            self.inbox.put((to, Lost(token=token)))

    @contextmanager
    def _known(self, connection: socket.socket, token: int) -> Iterator[None]:
        self._sockets[connection] = token
        try:
            yield
        finally:
            self._sockets.pop(connection)

    def _introduce(self, connection: socket.socket, to: str, token: int) -> None:
        """Raises `DamagedError` for somebody who does not know the secret."""
        theirs = _read(connection, NONCE_BYTES)
        own = secrets.token_bytes(NONCE_BYTES)
        name = self.name.encode()
        greeting = len(name).to_bytes(2, "little") + name + token.to_bytes(8, "little") + own
        connection.sendall(greeting + self._proof("sender", theirs, own, self.name, to, token))
        _require_equal(
            _read(connection, sha256().digest_size), self._proof("receiver", theirs, own, self.name, to, token)
        )

    def _proof(self, role: str, theirs: bytes, own: bytes, sender: str, receiver: str, token: int) -> bytes:
        text = canonical_json([role, theirs.hex(), own.hex(), sender, receiver, token])
        return hmac.digest(self._secret, text, sha256)

    # ---- receiving ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                time.sleep(ACCEPT_PAUSE_SECONDS)  # closed, or there is no file descriptor left
            else:
                self._start(self._hear, connection)

    def _hear(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.settimeout(HANDSHAKE_SECONDS)
                sender, token = self._greet(connection)
                connection.settimeout(None)
            except (OSError, DamagedError):
                return
            try:
                with self._known(connection, token):
                    while True:
                        message = decode(lambda view: _read_into(connection, view), max_bytes=self._max_bytes)
                        if message.token == token:
                            self.inbox.put((sender, message))
            except (OSError, DamagedError, MemoryError):
                self.inbox.put((sender, Lost(token=token)))

    def _greet(self, connection: socket.socket) -> tuple[str, int]:
        """Who sends here, and of which token. Raises `DamagedError` for somebody who does not know the secret."""
        own = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(own)
        num_bytes = int.from_bytes(_read(connection, 2), "little")
        if num_bytes > MAX_NAME_BYTES:
            raise DamagedError("a greeting by a name that is too long")
        sender = _read(connection, num_bytes).decode(errors="replace")
        token = int.from_bytes(_read(connection, 8), "little")
        theirs = _read(connection, NONCE_BYTES)
        proof = _read(connection, sha256().digest_size)
        _require_equal(proof, self._proof("sender", own, theirs, sender, self.name, token))
        connection.sendall(self._proof("receiver", own, theirs, sender, self.name, token))
        return sender, token


def _require_equal(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise DamagedError("a greeting that does not prove where it comes from")


def _send_all(connection: socket.socket, message: Message) -> None:
    head, buffers = encode(message)
    views = [memoryview(head), *(buffer for buffer in buffers if len(buffer))]
    while views:
        num_sent = connection.sendmsg(views[:MAX_BUFFERS])
        while views and num_sent >= len(views[0]):
            num_sent -= len(views.pop(0))
        if num_sent:
            views[0] = views[0][num_sent:]


def _read(connection: socket.socket, num_bytes: int) -> bytes:
    found = bytearray(num_bytes)
    _read_into(connection, memoryview(found))
    return bytes(found)


def _read_into(connection: socket.socket, view: memoryview) -> None:
    """Raises `ConnectionError` at the end."""
    while len(view):
        num_bytes = connection.recv_into(view)
        if num_bytes == 0:
            raise ConnectionError("the peer closed the connection")
        view = view[num_bytes:]
