"""What a server's port is like."""

from __future__ import annotations

import socket

from tasks.serving.server import listening


def test_no_answer_waits_for_the_receipt_of_what_was_sent_before() -> None:
    """Headers and body are two packets: with Nagle's algorithm the second waits 40 ms for a delayed acknowledgement."""
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
