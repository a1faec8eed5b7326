"""A TCP proxy before the object store, which can be shut: the store is away then, for those behind it alone."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from types import TracebackType

CHUNK_BYTES = 1 << 16
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: to close is to reset the connection."""


class Gate:
    """Forwards every connection to `host:port`. While it is shut, old connections are reset, and new ones too."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_shut = False
        self.num_refused = 0
        """Connections that came while it was shut: the proof that somebody missed the store."""

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> Gate:
        threading.Thread(target=self._serve, name="gate", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.shut()

    def shut(self) -> None:
        with self._lock:
            self._is_shut = True
            for connection in self._open:
                _reset(connection)
            self._open.clear()

    def open(self) -> None:
        with self._lock:
            self._is_shut = False

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            with self._lock:
                if self._is_shut:
                    self.num_refused += 1
                    _reset(client)
                    client.close()
                    continue
            threading.Thread(target=self._forward, args=(client,), daemon=True).start()

    def _forward(self, client: socket.socket) -> None:
        """Until either side is done, or the gate is shut."""
        with client:
            try:
                server = socket.create_connection(self._upstream)
            except OSError:  # the store itself is away
                return
            with server:
                with self._lock:
                    self._open |= {client, server}
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()
                with self._lock:
                    self._open -= {client, server}


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):  # reset by either side, or by the gate
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """Wake up whoever reads from it; the close that follows resets it."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.shutdown(socket.SHUT_RDWR)
