"""The proxy that takes the store away: it forwards, it resets and refuses, and it forwards again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tasks.drill.gate import Gate
from tests.waiting import wait_until


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def answer(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(4096)


def test_it_is_shut_and_opened(echo: int) -> None:
    with Gate("127.0.0.1", echo) as gate:
        first = socket.create_connection(("127.0.0.1", gate.port), timeout=120)
        assert answer(first, b"one") == b"one"
        assert gate.num_refused == 0

        gate.shut()
        with first:
            assert is_cut(first)
        assert is_refused(gate.port)
        wait_until(lambda: gate.num_refused == 1, what="the refusal to be counted")

        gate.open()
        with socket.create_connection(("127.0.0.1", gate.port), timeout=120) as third:
            assert answer(third, b"two") == b"two"


def test_a_store_that_is_away_itself_is_a_closed_connection() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and listens not: nobody else can have that port meanwhile
        with (
            Gate("127.0.0.1", nobody.getsockname()[1]) as gate,
            socket.create_connection(("127.0.0.1", gate.port), timeout=120) as connection,
        ):
            assert is_cut(connection)
    assert gate.num_refused == 0


def is_refused(port: int) -> bool:
    """A connection that is reset at once may be so before `connect` has returned."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            return is_cut(connection)
    except (ConnectionResetError, BrokenPipeError):
        return True


def is_cut(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
