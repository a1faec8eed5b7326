"""Connections between hosts, held by the test itself: a socket stays in the network that it was made in."""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.faults.hosts import Host

SILENCE_SECONDS = 0.3
PATIENCE_SECONDS = 120.0
"""With what must come, however long a machine stalls."""


@contextlib.contextmanager
def connection(source: Host, target: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of one that `source` makes."""
    with target.namespace.listen(target.address) as listener:
        here = connect(source, target.address, listener.getsockname()[1])
        there, _ = listener.accept()
    with here, there:
        yield here, there


def connect(source: Host, address: str, port: int, *, timeout_seconds: float = PATIENCE_SECONDS) -> socket.socket:
    return source.namespace.inside(lambda: socket.create_connection((address, port), timeout=timeout_seconds))


def arrives(source: socket.socket, target: socket.socket, *, within_seconds: float = SILENCE_SECONDS) -> bool:
    """Whether a word does."""
    source.sendall(b"word")
    return hears(target, within_seconds=within_seconds)


def hears(target: socket.socket, *, within_seconds: float = PATIENCE_SECONDS) -> bool:
    target.settimeout(within_seconds)
    with contextlib.suppress(TimeoutError):
        return bool(target.recv(1 << 16))
    return False


def seconds_to_send(source: socket.socket, target: socket.socket, num_bytes: int) -> float:
    """Until the last byte has arrived. It must fit into the buffers of both."""
    started = time.monotonic()
    source.sendall(bytes(num_bytes))
    target.settimeout(PATIENCE_SECONDS)
    while num_bytes:
        num_bytes -= len(target.recv(1 << 16))
    return time.monotonic() - started


def http_status(source: Host, endpoint: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> int:
    """Of a GET that the host makes."""
    where = urlsplit(endpoint)
    client = http.client.HTTPConnection(where.netloc, timeout=timeout_seconds)
    assert where.hostname is not None
    assert where.port is not None
    client.sock = connect(source, where.hostname, where.port, timeout_seconds=timeout_seconds)
    with contextlib.closing(client):
        client.request("GET", where.path or "/")
        return client.getresponse().status
