"""The doctor: all is well, no stack, and a store on which no protocol can be built."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import unbroken
from tests.conftest import UNBROKEN, Stack
from tests.infra.probes import environment_for
from tests.waiting import wait_until


class YesServer(ThreadingHTTPServer):
    """An object store that says yes to every PUT, whatever the condition."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _YesHandler)
        self.objects: dict[str, bytes] = {}
        self.num_conditions_ignored = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _YesHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: YesServer

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("X-Amz-Decoded-Content-Length") or self.headers["Content-Length"]))
        if self.path in self.server.objects and self.headers.get("If-None-Match") == "*":
            self.server.num_conditions_ignored += 1
        self.server.objects[self.path] = body
        self._reply(200, etag=_etag(body))

    def do_GET(self) -> None:
        body = self.server.objects.get(self.path)
        self._reply(404) if body is None else self._reply(200, body, etag=_etag(body))

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self._reply(204)

    def _reply(self, status: int, body: bytes = b"", *, etag: str | None = None) -> None:
        self.send_response_only(status)
        if etag is not None:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its assertions."""


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body).hexdigest()}"'


@pytest.fixture
def yes_server() -> Iterator[YesServer]:
    with YesServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_all_is_well(stack: Stack) -> None:
    checks = _examined(stack, wrong=set())
    assert set(checks) >= {"python", "memory", "disk", "torch", "S3 storage", "MLflow", "Prefect", "Prefect worker"}
    assert "create-only and If-Match writes honoured" in checks["S3 storage"]["found"]
    assert stack.store.list_folders("probe/") == []
    assert list(stack.store.list_keys("probe/")) == [], "it cleans up after itself"


def test_missing_stack_is_one_wrong_check_with_its_cure(tmp_path: Path) -> None:
    environment = environment_for(tmp_path / "home")
    done = subprocess.run(
        [UNBROKEN, "doctor", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    wrong = {name: check["found"] for name, check in _checks(done).items() if not check["is_good"]}
    assert set(wrong) == {"stack"}
    assert "`unbroken up`" in wrong["stack"]


def test_store_that_ignores_conditions_is_refused_by_name(stack: Stack, yes_server: YesServer) -> None:
    lying = {"UNBROKEN_S3_ENDPOINT": yes_server.endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    checks = _examined(stack, wrong={"S3 storage"}, variables=lying)
    assert yes_server.num_conditions_ignored >= 1, "the store was asked, and it lied"
    assert f"the store at {yes_server.endpoint} ignores create-only writes" in checks["S3 storage"]["found"]
    assert not yes_server.objects


def test_servers_that_do_not_answer_are_wrong_checks_and_no_traceback(stack: Stack) -> None:
    servers = {"UNBROKEN_MLFLOW_URI": "nonsense", "UNBROKEN_PREFECT_API_URL": "http://127.0.0.1:1/api"}
    _examined(stack, wrong={"MLflow", "Prefect", "Prefect worker"}, variables=servers)


def _examined(stack: Stack, *, wrong: set[str], variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The checks, once these alone are wrong: so is a server that is slow to answer just now."""

    def look() -> dict[str, Any] | None:
        done = unbroken(stack, "doctor", "--json", variables=variables)
        assert done.returncode in (0, 3), done.stderr
        checks = _checks(done)
        found = {name for name, check in checks.items() if not check["is_good"]}
        assert found >= wrong
        assert done.returncode == (3 if found else 0)
        return checks if found == wrong else None

    return wait_until(look, what=f"these alone to be wrong: {wrong}")


def _checks(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(done.stdout)}
