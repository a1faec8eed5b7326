"""A real server before a real store: what it answers, and that promotions, kills, damage and outages fail nobody."""

from __future__ import annotations

import os
import signal
import socket
import threading
from urllib.parse import urlsplit

from tasks.lifecycle.model_file import Signature, Tensor, file_key
from tests.conftest import Stack
from tests.serving.load import NUM_CLIENTS, ROW, Corner, under_load
from tests.serving.models import NUM_FIELDS, SIGNATURE, keep, promote
from tests.serving.programs import program
from tests.serving.servers import Server, is_alive
from tests.waiting import wait_until
from training.s3.objectstore import Store


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
        head = b"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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
            b"POST /invocations HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
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


def test_promotions_and_a_kill_under_load(corner: Corner) -> None:
    under_load(corner, num_clients=NUM_CLIENTS, every_seconds=0.005, promotion_seconds=0.0)


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
        wait_until(lambda kept=kept: kept.version in server.errors, what="the refusal to be logged")
        assert server.metric("unbroken_serving_refused") == 1
        reply = client.predict({"inputs": [ROW]})
        assert (reply.version, reply.document["predictions"]) == ("1", [[1.0] * NUM_FIELDS])
    corner.become_champion("2")
    wait_until(lambda: server.get("/version")["refused"] is None, what="the refusal to be forgotten")
    wait_until(lambda: server.metric("unbroken_serving_refused") == 0, what="the refusal to be forgotten")
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
            head = f"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"  # noqa: E501
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
