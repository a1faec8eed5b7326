"""A proxy before an S3 server that lets requests through, and loses the replies that a test tells it to lose.

The server applies the request; the client sees its connection close. While the proxy `is_away`, it answers everything
with 503 and forwards nothing. `num_lost` and `num_refused` prove that the fault fired. A test may also watch every
request go by, before it is applied (status 0) and after.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

HOP_HEADERS = {"connection", "expect", "transfer-encoding", "content-length"}


class LosingProxy:
    """Forwards everything to `endpoint`; loses the replies to the next `lose` requests of `method`."""

    def __init__(self, endpoint: str) -> None:
        self._upstream = urlsplit(endpoint).netloc
        self._lock = threading.Lock()
        self._method = ""
        self._remaining = 0
        self.num_lost = 0
        self.is_away = False
        self.maybe_refused: str | None = None
        """Part of a path: requests for such are answered with 503 alone."""
        self.num_refused = 0
        self.watch: Callable[[str, str, int], None] = lambda method, path, status: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def lose_replies(self, method: str, count: int = 1) -> None:
        with self._lock:
            self._method, self._remaining = method, count

    def __enter__(self) -> LosingProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _loses(self, method: str) -> bool:
        with self._lock:
            if method != self._method or self._remaining == 0:
                return False
            self._remaining -= 1
            self.num_lost += 1
            return True

    def _reply(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Reply:
        with self._lock:
            if self.is_away or (self.maybe_refused is not None and self.maybe_refused in path):
                self.num_refused += 1
                return _Reply(503, [], b"<Error><Code>SlowDown</Code></Error>")
        return self._forward(method, path, headers, body)

    def _forward(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> _Reply:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                if name.lower() not in HOP_HEADERS:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return _Reply(response.status, response.getheaders(), response.read())
        finally:
            connection.close()

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.watch(self.command, self.path, 0)
                reply = proxy._reply(self.command, self.path, list(self.headers.items()), body)
                proxy.watch(self.command, self.path, reply.status)
                if proxy._loses(self.command):
                    self.close_connection = True
                    return
                self.send_response_only(reply.status)
                for name, value in reply.headers:
                    if name.lower() not in HOP_HEADERS:
                        self.send_header(name, value)
                length = dict(reply.headers).get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a test's output is its assertions."""

        return Handler


class _Reply:
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body
