"""The least of S3, with or without conditional writes: some real stores accept the headers and ignore them."""

from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

import pytest

from training.s3.objectstore import StoreLocation


class FakeS3:
    """GET, PUT and DELETE of objects in memory; credentials are set to anything while it runs."""

    def __init__(self, *, create_only: bool = True, if_match: bool = True, has_bucket: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self._create_only = create_only
        self._if_match = if_match
        self.has_bucket = has_bucket
        self.refuses: tuple[int, str] | None = None
        """Each request: with this status and code."""
        self.tokens: list[str | None] = []
        """The session token of each request."""
        self._lock = threading.Lock()
        self._environment = pytest.MonkeyPatch()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._thread = threading.Thread(target=self._server.serve_forever, name="fake-s3", daemon=True)

    @property
    def location(self) -> StoreLocation:
        return StoreLocation(endpoint=f"http://127.0.0.1:{self._server.server_address[1]}", bucket="bucket")

    def __enter__(self) -> FakeS3:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            self._environment.setenv(name, "anything")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._environment.undo()

    def _put(self, path: str, body: bytes, must_be_new: bool, maybe_etag: str | None) -> int:
        with self._lock:
            if self.refuses is not None:
                return self.refuses[0]
            if self._create_only and must_be_new and path in self.objects:
                return 412
            if self._if_match and maybe_etag is not None and maybe_etag != _etag(self.objects.get(path, b"")):
                return 412
            self.objects[path] = body
            return 200

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                found = fake.objects.get(self.path)
                self.reply(200 if found is not None else 404, found or b"")

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.reply(fake._put(self.path, body, "If-None-Match" in self.headers, self.headers.get("If-Match")))

            def do_DELETE(self) -> None:
                if fake.refuses is None:  # what is refused changes nothing
                    fake.objects.pop(self.path, None)
                self.reply(204)

            def reply(self, status: int, body: bytes = b"") -> None:
                fake.tokens.append(self.headers.get("X-Amz-Security-Token"))
                if fake.refuses is not None:
                    status, body = fake.refuses[0], f"<Error><Code>{fake.refuses[1]}</Code></Error>".encode()
                elif not fake.has_bucket:
                    status, body = 404, b"<Error><Code>NoSuchBucket</Code></Error>"
                elif status == 412:
                    body = b"<Error><Code>PreconditionFailed</Code></Error>"
                elif status == 404:
                    body = b"<Error><Code>NoSuchKey</Code></Error>"
                self.send_response_only(status)
                self.send_header("ETag", _etag(body))
                self.send_header("Date", format_datetime(datetime(2001, 9, 9, tzinfo=UTC), usegmt=True))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: a test's output is its assertions."""

        return Handler


def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()}"'
