"""How the processes of one group hear one another: a connection for each direction between two of them, through memory
that both have if they are on one host (training.servers.shared), else by TCP. Which it is, is found out: whoever
listens at an address does so by a name of it too, among the abstract Unix sockets, which only its own host reaches.

A connection's order is the order of its messages, and its end is an event: who is told that a peer is lost does not
wait for it. Both ends prove that they know the run's secret, for this token and these names alone; what follows is
trusted, as in a group of gloo.
"""

from __future__ import annotations

import hmac
import logging
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256

from training.documents import canonical_json
from training.errors import DamagedError
from training.servers.outbox import Outbox
from training.servers.protocol import Message, Send
from training.servers.shared import SharedReceiver, SharedSender
from training.servers.streams import StreamReceiver, StreamSender

HANDSHAKE_SECONDS = 5.0
"""For all of it."""
MAX_UNPROVEN = 1024
"""Connections whose other end has not proven yet that it knows the secret."""
ACCEPT_PAUSE_SECONDS = 0.1
NONCE_BYTES = 16
MAX_NAME_BYTES = 256
MIN_SECONDS = 0.001
CREDENTIALS = struct.Struct("3i")
"""Process, user and group, as Linux tells them of a local socket's other end."""

Address = tuple[str, int]
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A peer closed its connection, or never could be reached."""

    token: int


Word = tuple[str, Message | Lost]
"""Who sends, and what."""


class Mesh:
    """`hear` is called with each word, by the thread that it comes by. Until it is set, `inbox` has them: who
    serves sets it before anybody knows the address."""

    def __init__(
        self, name: str, *, secret: str, address: str, max_bytes: int, here: dict[str, Mesh] | None = None
    ) -> None:
        """`here` are the meshes of this process that need no connection to one another; this one becomes one of them.
        What they say comes as it is, not copied: nobody may change it afterwards."""
        self.name = name
        self._here = {} if here is None else here
        self._here[name] = self
        self.inbox: queue.SimpleQueue[Word] = queue.SimpleQueue()
        self.hear: Callable[[Word], None] = self.inbox.put
        self._secret = secret.encode()
        self._max_bytes = max_bytes
        self._listener = socket.create_server((address, 0))
        self.address: Address = self._listener.getsockname()[:2]
        maybe_local = _maybe_listening_at(_local_name(self.address))
        self._unproven = threading.BoundedSemaphore(MAX_UNPROVEN)
        self._listeners = [self._listener, *([maybe_local] if maybe_local else [])]
        self._lock = threading.Lock()
        self._is_closed = False
        self._token = 0
        self._places: Mapping[str, Address] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._sockets: dict[socket.socket, int] = {}
        """Of both directions, and the token that each is of."""
        for listener in self._listeners:
            self._start(self._accept, listener)

    def begin(self, token: int, places: Mapping[str, Address]) -> None:
        """Another group, whose members are there. What goes to members of the one before is given up."""
        with self._lock:
            for outbox in self._outboxes.values():
                outbox.end()
            self._token, self._places, self._outboxes = token, places, {}
        for connection, of_token in list(self._sockets.items()):
            if of_token < token:  # whoever is stuck in one hears of its end
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def send(self, sends: list[Send]) -> None:
        """In order, for each receiver; first to other processes, as those here do at once what follows from it. Whoever
        is in no group, or gone, gets nothing."""
        near = [(mesh, one.message) for one in sends if (mesh := self._maybe_near(one)) is not None]
        for mesh, message in near:
            mesh.hear((self.name, message))

    def _maybe_near(self, one: Send) -> Mesh | None:
        """Who is to hear it here; else it is on its way."""
        with self._lock:
            if one.message.token != self._token or one.to not in self._places:
                return None
            maybe_here = self._here.get(one.to)
            if maybe_here is not None:
                return maybe_here
            if one.to not in self._outboxes:
                self._outboxes[one.to] = Outbox()
                self._start(self._deliver, one.to, self._places[one.to], self._token, self._outboxes[one.to])
            outbox = self._outboxes[one.to]
        outbox.put(one.message)
        return None

    def close(self) -> None:
        self._is_closed = True
        self._here.pop(self.name)
        self.begin(0, {})
        for listener in self._listeners:
            with self._lock, suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _start(self, function: object, *arguments: object) -> None:
        threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]

    # ---- sending -----------------------------------------------------------------------------------------------------

    def _deliver(self, to: str, address: Address, token: int, outbox: Outbox) -> None:
        try:
            with self._connected(to, address, token) as connection, self._known(connection, token):
                outbox.deliver(SharedSender(connection) if _is_local(connection) else StreamSender(connection))
        except Exception as error:  # also what cannot be encoded: whoever waits for it hears that it will not come
            if not isinstance(error, OSError | DamagedError):
                log.exception("%s could not say something to %s", self.name, to)
            self.hear((to, Lost(token=token)))

    def _connected(self, to: str, address: Address, token: int) -> socket.socket:
        """By the nearest way. Raises `OSError`; `DamagedError` for somebody who does not know the secret."""
        with suppress(OSError, DamagedError):  # it is on another host, or somebody here took that name
            return self._introduced(_connected_to(_local_name(address)), to, token)
        connection = socket.create_connection(address, timeout=HANDSHAKE_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._introduced(connection, to, token)

    def _introduced(self, connection: socket.socket, to: str, token: int) -> socket.socket:
        try:
            _require_own(connection)
            self._introduce(connection, to, token)
        except BaseException:
            connection.close()
            raise
        connection.settimeout(None)
        return connection

    @contextmanager
    def _known(self, connection: socket.socket, token: int) -> Iterator[None]:
        self._sockets[connection] = token
        try:
            yield
        finally:
            self._sockets.pop(connection)

    def _introduce(self, connection: socket.socket, to: str, token: int) -> None:
        """Raises `DamagedError` for somebody who does not know the secret."""
        read = _Reading(connection)
        theirs = read(NONCE_BYTES)
        own = secrets.token_bytes(NONCE_BYTES)
        way, name = connection.family, self.name.encode()
        greeting = len(name).to_bytes(2, "little") + name + token.to_bytes(8, "little") + own
        connection.sendall(greeting + self._proof("sender", way, theirs, own, self.name, to, token))
        _require_equal(read(sha256().digest_size), self._proof("receiver", way, theirs, own, self.name, to, token))

    def _proof(self, role: str, way: int, theirs: bytes, own: bytes, sender: str, receiver: str, token: int) -> bytes:
        """For this way alone: who stands between a local name that he took and the process that it should be of, has
        nothing to hand on."""
        text = canonical_json([role, int(way), theirs.hex(), own.hex(), sender, receiver, token])
        return hmac.digest(self._secret, text, sha256)

    # ---- receiving ---------------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while not self._is_closed:
            try:
                connection, _ = listener.accept()
            except OSError:
                time.sleep(ACCEPT_PAUSE_SECONDS)  # closed, or there is no file descriptor left
            else:
                if self._unproven.acquire(blocking=False):
                    self._start(self._hear, connection)
                else:
                    connection.close()

    def _hear(self, connection: socket.socket) -> None:
        with connection:
            try:
                sender, token = self._greet(connection)
                connection.settimeout(None)
            except (OSError, DamagedError):
                return
            finally:
                self._unproven.release()
            try:
                receiver = SharedReceiver(connection) if _is_local(connection) else StreamReceiver(connection)
                with self._known(connection, token):
                    while True:
                        message = receiver.receive(max_bytes=self._max_bytes)
                        if message.token == token:
                            self.hear((sender, message))
                        del message  # or it would keep its memory until the next one comes
            except (OSError, DamagedError, MemoryError):
                self.hear((sender, Lost(token=token)))

    def _greet(self, connection: socket.socket) -> tuple[str, int]:
        """Who sends here, and of which token. Raises `DamagedError` for somebody who does not know the secret."""
        _require_own(connection)
        read, way = _Reading(connection), connection.family
        own = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(own)
        num_bytes = int.from_bytes(read(2), "little")
        if num_bytes > MAX_NAME_BYTES:
            raise DamagedError("a greeting by a name that is too long")
        sender = read(num_bytes).decode(errors="replace")
        token = int.from_bytes(read(8), "little")
        theirs = read(NONCE_BYTES)
        proof = read(sha256().digest_size)
        _require_equal(proof, self._proof("sender", way, own, theirs, sender, self.name, token))
        connection.sendall(self._proof("receiver", way, own, theirs, sender, self.name, token))
        return sender, token


class _Reading:
    """All that is read of a handshake, in `HANDSHAKE_SECONDS`: who sends a byte now and then holds nobody up."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + HANDSHAKE_SECONDS

    def __call__(self, num_bytes: int) -> bytes:
        """Raises `OSError` at the end, or if it takes too long."""
        found = b""
        while len(found) < num_bytes:
            self._connection.settimeout(max(self._deadline - time.monotonic(), MIN_SECONDS))
            part = self._connection.recv(num_bytes - len(found))
            if not part:
                raise ConnectionError("the peer closed the connection")
            found += part
        return found


def _require_own(connection: socket.socket) -> None:
    """Raises `DamagedError` if a local socket's other end is of another user."""
    if _is_local(connection):
        found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        _, user, _ = CREDENTIALS.unpack(found)
        if user != os.geteuid():
            raise DamagedError(f"a local connection of user {user}")


def _require_equal(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise DamagedError("a greeting that does not prove where it comes from")


def _local_name(address: Address) -> str:
    """Of an abstract Unix socket, which is no file, and gone with its process."""
    host, port = address
    return f"\0unbroken-mesh-{host}-{port}"


def _is_local(connection: socket.socket) -> bool:
    return connection.family == socket.AF_UNIX


def _maybe_listening_at(name: str) -> socket.socket | None:
    """None if somebody has taken that name: then all come by TCP."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(name)
        listener.listen()
    except OSError as error:
        log.warning("no memory is shared with other processes of this host: %s is taken (%s)", name[1:], error)
        listener.close()
        return None
    return listener


def _connected_to(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(HANDSHAKE_SECONDS)
    try:
        connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection
