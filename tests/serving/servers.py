"""A real `unbroken serve` in a process of its own, and asking it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import UNBROKEN, Stack
from tests.waiting import wait_until
from training.s3.objectstore import Store


@dataclass(frozen=True)
class Reply:
    status: int
    version: str | None
    document: Any


class Client:
    """One kept-alive connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)

    def ask(self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json") -> Reply:
        self._connection.request(method, path, body, {"Content-Type": content_type} if body is not None else {})
        reply = self._connection.getresponse()
        data = reply.read()
        try:
            document = json.loads(data)
        except ValueError:
            document = data.decode()
        return Reply(reply.status, reply.getheader("x-unbroken-version"), document)

    def predict(self, document: Any) -> Reply:
        return self.ask("POST", "/invocations", json.dumps(document).encode())

    def close(self) -> None:
        self._connection.close()


class Server:
    """Serves from a test's corner of the store, looking at the champion ten times a second."""

    def __init__(self, stack: Stack, store: Store, model: str, *, replicas: int = 2, endpoint: str = "") -> None:
        self._process = subprocess.Popen(
            [UNBROKEN, "serve", model, "--replicas", str(replicas), "--poll-seconds", "0.1", "--json"],
            env=corner(stack, store, endpoint),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._errors: list[str] = []
        self._reading = threading.Thread(target=lambda: self._errors.extend(iter(self._process.stderr.readline, "")))
        self._reading.start()
        line = self._process.stdout.readline()
        assert line, self.stop()
        self.told = json.loads(line)
        self.url = self.told["url"]

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        errors = self.stop()
        assert "Traceback" not in errors, errors

    @property
    def errors(self) -> str:
        """What it has printed to stderr so far."""
        return "".join(self._errors)

    def client(self) -> Client:
        return Client(self.url)

    def get(self, path: str) -> Any:
        client = self.client()
        try:
            return client.ask("GET", path).document
        finally:
            client.close()

    def metric(self, name: str) -> float:
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].split()[-1])

    def wait_for_version(self, version: str) -> None:
        wait_until(lambda: self.get("/version")["version"] == version, what=f"version {version} to be served")

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        return self._process.wait(120)

    def stop(self) -> str:
        """Returns what it printed to stderr."""
        if self._process.poll() is None:
            self.terminate()
        self.wait()
        self._reading.join()
        self._process.stdout.close()
        self._process.stderr.close()
        return self.errors


def corner(stack: Stack, store: Store, endpoint: str = "") -> Mapping[str, str]:
    """The environment of a command for which the store is a test's corner of it, behind `endpoint` if one is given."""
    behind = {"UNBROKEN_S3_ENDPOINT": endpoint} if endpoint else {}
    return {**stack.environment(), "UNBROKEN_S3_PREFIX": store.location.prefix, **behind}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
