"""Fixtures of the fault tests."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator, Sequence

import pytest

from tests.faults.hosts import Cluster, Host


class Answer(http.server.BaseHTTPRequestHandler):
    """Stands in for a store: 200 to everybody."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionResetError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def answering() -> Iterator[str]:
    """The endpoint of what stands in for a store."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def cluster(answering: str) -> Iterator[Cluster]:
    """Each test leaves it as it was."""
    with Cluster(3, store=answering) as running:
        yield running


@pytest.fixture
def host(cluster: Cluster) -> Iterator[Host]:
    yield cluster.hosts[0]
    cluster.hosts[0].kill_all()


@pytest.fixture
def hosts(cluster: Cluster) -> Iterator[Sequence[Host]]:
    yield cluster.hosts
    for host in cluster.hosts:
        host.kill_all()
