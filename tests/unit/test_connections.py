"""The sockets of a group can be cut from another thread, and no others are."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from training.connections import Connections


def test_who_waits_is_told_at_once_and_others_are_not() -> None:
    other, others_end = socket.socketpair()
    connections = Connections()
    with connections.opening():
        own, theirs = socket.socketpair()
    heard: list[bytes] = []
    waiting = threading.Thread(target=lambda: heard.append(own.recv(1)))
    waiting.start()
    connections.cut()
    waiting.join(120)
    assert heard == [b""]
    assert theirs.recv(1) == b""
    other.sendall(b"!")
    assert others_end.recv(1) == b"!"
    for end in (own, theirs, other, others_end):
        end.close()


@pytest.mark.parametrize("kind", ["a socket", "a file"])
def test_a_number_that_was_given_to_something_else_is_left_alone(kind: str) -> None:
    connections = Connections()
    with connections.opening():
        own, theirs = socket.socketpair()
    number = own.detach()
    theirs.close()
    later, laters_end = socket.socketpair()
    source = later.fileno() if kind == "a socket" else os.open(os.devnull, os.O_RDONLY)
    os.dup2(source, number)
    connections.cut()
    later.sendall(b"!")
    assert laters_end.recv(1) == b"!"
    os.close(number)
    for end in (later, laters_end):
        end.close()


def test_what_listens_goes_on_listening() -> None:
    connections = Connections()
    with connections.opening():
        listener = socket.create_server(("127.0.0.1", 0))
    connections.cut()
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0]:
        """Somebody could come."""
