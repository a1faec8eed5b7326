"""Clients that ask while the champion changes and a server process is killed, and what all of them must have seen."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import TracebackType

from tasks.lifecycle.model_file import KeptVersion
from tests.faults.proxy import LosingProxy
from tests.serving.models import NUM_FIELDS, promote
from tests.serving.servers import Server, is_alive
from tests.waiting import wait_until
from training.s3.objectstore import Store

CONSTANTS = {"1": 1.0, "2": 2.0, "3": 3.0}
"""What each version adds."""
ROW = [0.0] * NUM_FIELDS
NUM_CLIENTS = 4
NUM_PROMOTIONS = 10


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


@dataclass(frozen=True)
class Seen:
    """An answer, and when its request was sent and it came (monotonic, in seconds)."""

    status: int
    version: str | None
    predictions: list[list[float]]
    sent: float
    came: float


class Load:
    """Clients that each ask so often, or as often as they can, while a `with` lasts."""

    def __init__(self, server: Server, *, num_clients: int, every_seconds: float) -> None:
        self._server = server
        self._every_seconds = every_seconds
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]
        self.seen: list[Seen] = []
        self.failures: list[str] = []

    def _ask(self) -> None:
        client = self._server.client()
        try:
            while not self._stop.is_set():
                sent = time.monotonic()
                reply = client.predict({"inputs": [ROW, ROW]})
                came = time.monotonic()
                self.seen.append(Seen(reply.status, reply.version, reply.document.get("predictions"), sent, came))
                time.sleep(max(0.0, sent + self._every_seconds - came))
        except Exception as error:  # a connection that broke is what this is to find
            self.failures.append(repr(error))
        client.close()

    def has_seen(self, version: str) -> bool:
        return bool(self.failures) or any(seen.version == version for seen in self.seen)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def under_load(corner: Corner, *, num_clients: int, every_seconds: float, promotion_seconds: float) -> list[Seen]:
    """Ten promotions and rollbacks, the next one when the last is served and so long afterwards, and a `kill -9`.

    Nothing fails, no answer is mixed, and each names a version that was champion while it was asked.
    """
    corner.become_champion("1")
    wait_until(lambda: corner.server.get("/version")["replicas"]["ready"] == 2, what="all whom others killed replaced")
    served = [Reign("1", 0.0, 0.0)]
    deaths = corner.server.metric("unbroken_serving_replica_deaths_total")
    with Load(corner.server, num_clients=num_clients, every_seconds=every_seconds) as load:
        for step in range(1, NUM_PROMOTIONS + 1):
            time.sleep(promotion_seconds)
            if step == NUM_PROMOTIONS // 2:
                killed = corner.server.get("/version")["replicas"]["pids"][0]
                os.kill(killed, signal.SIGKILL)
            version = str(1 + step % len(CONSTANTS))
            promoted = corner.become_champion(version)
            served.append(Reign(version, promoted, time.monotonic()))
            wait_until(lambda version=version: load.has_seen(version), what="somebody to be answered by it")
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
    return load.seen


@dataclass(frozen=True)
class Reign:
    """A version became champion at `promoted`, and was seen to be served at `known` (monotonic, in seconds)."""

    version: str
    promoted: float
    known: float


def _could_be_served(seen: Seen, served: list[Reign]) -> bool:
    """Promoted before the answer came, and its successor not known to be served when the request was sent."""
    ends = [reign.known for reign in served[1:]] + [float("inf")]
    return any(
        reign.version == seen.version and reign.promoted <= seen.came and seen.sent <= end
        for reign, end in zip(served, ends, strict=True)
    )
