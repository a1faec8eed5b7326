"""A real server before a real store: what it answers, and that promotions, kills, damage and outages fail nobody."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from tasks.serving.published import KeptVersion, Signature, Tensor, file_key
from tests.conftest import Stack
from tests.faults.proxy import LosingProxy
from tests.serving.models import NUM_FIELDS, SIGNATURE, keep, promote
from tests.serving.programs import program
from tests.serving.servers import Server, is_alive
from tests.waiting import wait_until
from training.s3.objectstore import Store, StoreLocation

CONSTANTS = {"1": 1.0, "2": 2.0, "3": 3.0}
ROW = [0.0] * NUM_FIELDS
NUM_CLIENTS = 4


@dataclass(frozen=True)
class Corner:
    """Three versions of a model, the first one champion; and a server of it, before a proxy."""

    store: Store
    kept: dict[str, KeptVersion]
    server: Server
    proxy: LosingProxy

    def become_champion(self, version: str) -> float:
        """And be served."""
        began = promote(self.store, self.kept[version])
        self.server.wait_for_version(version)
        return began


@pytest.fixture(scope="module")
def corner(stack: Stack) -> Iterator[Corner]:
    where = stack.location
    store = Store(
        StoreLocation(endpoint=where.endpoint, bucket=where.bucket, prefix=f"tests/serving-{os.urandom(4).hex()}/")
    )
    kept = {version: keep(store, "adder", version, program(constant)) for version, constant in CONSTANTS.items()}
    promote(store, kept["1"])
    assert where.endpoint is not None
    with (
        LosingProxy(where.endpoint) as proxy,
        Server(stack, store, "adder@champion", endpoint=proxy.endpoint) as server,
    ):
        yield Corner(store, kept, server, proxy)


def test_protocol(corner: Corner) -> None:
    corner.become_champion("1")
    client = corner.server.client()
    for field in ("inputs", "instances"):
        reply = client.predict({field: [[1, 2, 3], [4, 5, 6]]})
        assert (reply.status, reply.version) == (200, "1")
        assert reply.document == {"predictions": [[2, 3, 4], [5, 6, 7]], "model_version": "1"}
    refused = client.predict({"inputs": [[1, 2]]})
    assert (refused.status, refused.version) == (400, "1")
    assert refused.document["error_code"] == "BAD_REQUEST"
    assert "inputs[0]: expected 3 items, found 2" in refused.document["message"]
    assert client.ask("POST", "/invocations", b"{}", "text/csv").status == 415
    assert client.ask("GET", "/invocations").status == 405
    assert client.ask("GET", "/ping") == client.ask("GET", "/health")
    assert client.ask("GET", "/ping").status == 200
    told = client.ask("GET", "/version").document
    assert (told["model"], told["version"], told["model_sha256"]) == ("adder", "1", corner.kept["1"].model_sha256)
    assert told["refused"] is told["store_trouble"] is None
    assert corner.server.metric('unbroken_serving_requests_total{status="400"}') >= 1
    client.close()


def test_too_large_bodies(corner: Corner) -> None:
    client = corner.server.client()
    with socket.create_connection((urlsplit(corner.server.url).hostname, urlsplit(corner.server.url).port)) as raw:
        head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        raw.sendall(head + b"Content-Length: 99999999\r\n\r\n")
        assert b" 413 " in raw.recv(100)
    reply = client.ask("POST", "/invocations", b'{"inputs": [' + b" " * (16 << 20) + b"]}")
    assert reply.status == 413
    assert "larger than 16777216 bytes" in reply.document["message"]
    client.close()


def test_a_request_that_is_given_up_harms_nobody(corner: Corner) -> None:
    address = urlsplit(corner.server.url)
    name = 'unbroken_serving_requests_total{status="499"}'
    with socket.create_connection((address.hostname, address.port)) as raw:
        raw.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
    wait_until(lambda: name in corner.server.get("/metrics"), what="the request to be counted as given up")
    client = corner.server.client()
    assert client.predict({"inputs": [ROW]}).status == 200
    client.close()


def test_what_a_model_cannot_compute_fails_alone(corner: Corner) -> None:
    """Its neighbours in the batch are answered."""
    bad = [[2000.0, 0, 0]]
    statuses: list[list[int]] = [[] for _ in range(NUM_CLIENTS)]

    def ask(number: int) -> None:
        client = corner.server.client()
        for _ in range(20):
            statuses[number].append(client.predict({"inputs": bad if number == 0 else [ROW]}).status)
        client.close()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [[500] * 20] + [[200] * 20] * (NUM_CLIENTS - 1)


@dataclass(frozen=True)
class Seen:
    """An answer, and when its request was sent and it came (monotonic, in seconds)."""

    status: int
    version: str | None
    predictions: list[list[float]]
    sent: float
    came: float


class Load:
    """Clients that ask without a pause, while a `with` lasts."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self.seen: list[Seen] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(NUM_CLIENTS)]
        self.failures: list[str] = []

    def _ask(self) -> None:
        client = self._server.client()
        try:
            while not self._stop.is_set():
                sent = time.monotonic()
                reply = client.predict({"inputs": [ROW, ROW]})
                self.seen.append(
                    Seen(reply.status, reply.version, reply.document.get("predictions"), sent, time.monotonic())
                )
                time.sleep(0.005)
        except Exception as error:  # a connection that broke is what this is to find
            self.failures.append(repr(error))
        client.close()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_promotions_and_a_kill_under_load(corner: Corner) -> None:
    corner.become_champion("1")
    order = [str(1 + step % 3) for step in range(1, 11)]
    served: list[tuple[str, float, float]] = [("1", 0.0, 0.0)]
    """Version, promoted at, known to be served at."""
    deaths = corner.server.metric("unbroken_serving_replica_deaths_total")
    with Load(corner.server) as load:
        for step, version in enumerate(order):
            if step == 4:
                killed = corner.server.get("/version")["replicas"]["pids"][0]
                os.kill(killed, signal.SIGKILL)
            promoted = corner.become_champion(version)
            served.append((version, promoted, time.monotonic()))
        wait_until(lambda: corner.server.get("/version")["replicas"]["ready"] == 2, what="the replica to be replaced")
    assert load.failures == []
    assert {seen.status for seen in load.seen} == {200}
    assert corner.server.metric("unbroken_serving_replica_deaths_total") == deaths + 1
    assert not is_alive(killed)
    for seen in load.seen:
        assert seen.version is not None
        assert seen.predictions == [[CONSTANTS[seen.version]] * NUM_FIELDS] * 2, "mixed"
        assert _could_be_served(seen, served), (seen, served)
    assert {seen.version for seen in load.seen} == set(CONSTANTS)


def _could_be_served(seen: Seen, served: list[tuple[str, float, float]]) -> bool:
    """Promoted before the answer came, and its successor not known to be served when the request was sent."""
    ends = [known for _, _, known in served[1:]] + [float("inf")]
    return any(
        version == seen.version and promoted <= seen.came and seen.sent <= end
        for (version, promoted, _), end in zip(served, ends, strict=True)
    )


def test_damaged_files_are_refused(corner: Corner) -> None:
    corner.become_champion("1")
    store, server = corner.store, corner.server
    client = server.client()
    data = bytearray(program(9.0))
    damaged = keep(store, "adder", f"damaged-{os.urandom(4).hex()}", bytes(data))
    data[len(data) // 2] ^= 1
    store.put(file_key("adder", damaged.model_sha256), data)
    missing = keep(store, "adder", f"missing-{os.urandom(4).hex()}", bytes(program(10.0)))
    store.delete(file_key("adder", missing.model_sha256))
    no_program = keep(store, "adder", f"nothing-{os.urandom(4).hex()}", os.urandom(100))
    other = Signature(inputs=SIGNATURE.inputs, outputs=Tensor(dtype="int64", shape=(-1, NUM_FIELDS)))
    unlike = keep(store, "adder", f"unlike-{os.urandom(4).hex()}", program(11.0), other)
    for kept, reason in (
        (damaged, "is damaged"),
        (missing, "is missing"),
        (no_program, "cannot be run by torch"),
        (unlike, "its signature says int64"),
    ):
        promote(store, kept)
        wait_until(lambda reason=reason: reason in (server.get("/version")["refused"] or ""), what=f"refusal: {reason}")
        assert kept.version in server.errors
        assert server.metric("unbroken_serving_refused") == 1
        reply = client.predict({"inputs": [ROW]})
        assert (reply.version, reply.document["predictions"]) == ("1", [[1.0] * NUM_FIELDS])
    corner.become_champion("2")
    assert server.get("/version")["refused"] is None
    assert server.metric("unbroken_serving_refused") == 0
    client.close()


def test_the_store_is_away(corner: Corner) -> None:
    """It serves on, replaces a replica that dies, and follows the champion once the store is back."""
    corner.become_champion("1")
    server = corner.server
    client = server.client()
    before = corner.proxy.num_refused
    corner.proxy.is_away = True
    try:
        wait_until(lambda: server.metric("unbroken_serving_store_away") == 1, what="the outage to be seen")
        assert corner.proxy.num_refused > before
        for pid in server.get("/version")["replicas"]["pids"]:
            os.kill(pid, signal.SIGKILL)
        assert client.predict({"inputs": [ROW]}).version == "1"
        promote(corner.store, corner.kept["3"])
        assert server.get("/version")["store_trouble"]
    finally:
        corner.proxy.is_away = False
    server.wait_for_version("3")
    assert client.predict({"inputs": [ROW]}).document["predictions"] == [[3.0] * NUM_FIELDS]
    client.close()


def test_sigterm_drains(stack: Stack, store: Store) -> None:
    """One version, which no promotion changes; what was asked when the signal came is answered, and nobody is left."""
    promote(store, keep(store, "adder", "1", program(1.0)))
    with Server(stack, store, "adder/1", replicas=1) as server:
        pids = server.get("/version")["replicas"]["pids"]
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as raw:
            body = b'{"inputs": [[0, 0, 0]]}'
            head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"  # noqa: E501
            raw.sendall(head.encode() + b"\r\n\r\n" + body[:5])
            wait_until(lambda: server.get("/ping") == "\n", what="the server to have begun to read")
            for pid in pids:
                os.kill(pid, signal.SIGTERM)  # as a service manager does, which tells every process
            server.terminate()
            wait_until(lambda: _is_closed(address.hostname, address.port), what="the port to be closed")
            raw.sendall(body[5:])
            answer = b"".join(iter(lambda: raw.recv(4096), b""))
        assert b'{"predictions":[[1.0,1.0,1.0]]' in answer
        assert server.wait() == 0
        assert not any(map(is_alive, pids))


def _is_closed(host: str | None, port: int | None) -> bool:
    try:
        socket.create_connection((host, port)).close()
    except ConnectionRefusedError:
        return True
    return False
