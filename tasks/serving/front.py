"""Passes requests on to replicas, keeps these alive, and switches versions.

The switch is one assignment, of `current`: every request is stamped with it when it is passed on, so once an answer
came from the new version none comes from the old one (docs/serving.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tasks.serving.frames import Frame
from tasks.serving.link import Link, ReplicaGoneError
from tasks.serving.metrics import Metrics
from tasks.serving.offer import Offer
from training.errors import DamagedError, InfrastructureError

log = logging.getLogger(__name__)

MAX_TRIES = 3
ANSWER_SECONDS = 30.0
LOAD_SECONDS = 300.0
"""Patience with a replica that says nothing at all."""
READY_SECONDS = 60.0
"""How long a request waits for a replica, while all are being replaced."""
LOOK_SECONDS = 1.0
PAUSES_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Before a replica that never became ready is replaced once more."""


@dataclass(frozen=True)
class Answer:
    """To a request, and the version that gave it."""

    version: str
    frame: Frame


class Front:
    """Lives on one event loop, in the main thread: replicas die with the thread that started them."""

    def __init__(
        self, *, num_replicas: int, metrics: Metrics, start: Callable[[], Awaitable[Link]] = Link.start
    ) -> None:
        self._links: dict[int, Link] = {}
        self._num_replicas = num_replicas
        self._metrics = metrics
        self._start_link = start
        self._current: Offer | None = None
        self._coming: Offer | None = None
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refusals: dict[str, str] = {}
        self._num_deaths_by: Counter[str] = Counter()
        self.num_waiting = 0
        self.num_waiting_bytes = 0
        metrics.replicas.set_function(lambda: self.num_ready)

    @property
    def current(self) -> Offer:
        """What is served."""
        assert self._current is not None, "not started"
        return self._current

    @property
    def num_ready(self) -> int:
        return len(self._ready_links())

    @property
    def pids(self) -> list[int]:
        """Of the replicas."""
        return [link.process.pid for link in self._links.values()]

    async def start(self, offer: Offer) -> None:
        """Returns when the first replica is ready. Raises `DamagedError` if it refuses the program, or dies of it."""
        self._current = offer
        for slot in range(self._num_replicas):
            self._spawn(self._keep(slot))
        self._spawn(self._watch())
        await self._wait_settled(offer)
        self._metrics.show_version(offer.kept)

    async def predict(self, body: bytes) -> Answer:
        """Inference changes nothing, so what one replica did not answer another is asked.

        Raises `InfrastructureError` if there is no replica, or if this request has ended several of them.
        """
        self.num_waiting += 1
        self.num_waiting_bytes += len(body)
        try:
            for _ in range(MAX_TRIES):
                link, offer = await self._pick()
                try:
                    frame = await link.ask(
                        {"do": "predict", "identity": offer.identity}, body, patience_seconds=ANSWER_SECONDS
                    )
                except ReplicaGoneError:
                    self._metrics.tries_again.inc()
                    continue
                return Answer(offer.kept.version, frame)
        finally:
            self.num_waiting -= 1
            self.num_waiting_bytes -= len(body)
        raise InfrastructureError(f"{MAX_TRIES} servers ended before they had answered this request")

    async def switch(self, offer: Offer) -> None:
        """Serve another version, once every living replica is warm with it: one after another, so that a program that
        kills one strikes no two at once.

        Raises `DamagedError` if one refuses it, or several die of it; then nothing has changed.
        """
        before, self._coming = self.current, offer
        self._refusals.pop(offer.identity, None)
        self._num_deaths_by.pop(offer.identity, None)
        try:
            for link in list(self._links.values()):
                with suppress(ReplicaGoneError):
                    await self._load(link, offer)
            await self._wait_settled(offer)
            self._current = offer
        finally:
            self._coming = None
            self._drop(before if self._current is offer else offer)
        self._metrics.show_version(offer.kept)
        self._metrics.switches.inc()

    async def close(self) -> None:
        """End the replicas: nothing is asked any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _keep(self, slot: int) -> None:
        """One replica after another."""
        num_failures = 0
        while True:
            await asyncio.sleep(PAUSES_SECONDS[min(num_failures, len(PAUSES_SECONDS) - 1)])
            try:
                link = self._links[slot] = await self._start_link()
            except OSError as error:
                log.warning("a server process cannot be started, which is tried again: %s", error)
                num_failures += 1
                continue
            for offer in (self._current, self._coming):
                if offer is not None:
                    with suppress(ReplicaGoneError, DamagedError):
                        await self._load(link, offer)
            num_failures = 0 if link.ready else num_failures + 1
            if not link.ready:  # memory may have been short
                link.kill()
            await link.gone.wait()
            del self._links[slot]
            log.warning("server process %d ended (%s): another takes its place", link.process.pid, await link.end())
            self._metrics.deaths.inc()

    async def _load(self, link: Link, offer: Offer) -> None:
        try:
            answer = await link.ask(offer.told(), patience_seconds=LOAD_SECONDS)
        except ReplicaGoneError:
            self._num_deaths_by[offer.identity] += 1
            if self._num_deaths_by[offer.identity] >= MAX_TRIES:
                await self._refuse(offer, f"server processes die when they load version {offer.kept.version}")
            raise
        if "refused" in answer.head:
            await self._refuse(offer, answer.head["refused"])
            raise DamagedError(answer.head["refused"])
        if offer is self._current or offer is self._coming:  # else it was dropped meanwhile
            link.ready.add(offer.identity)
            await self._tell_change()

    async def _refuse(self, offer: Offer, why: str) -> None:
        if offer is self._current or offer is self._coming:
            self._refusals[offer.identity] = why
            await self._tell_change()

    def _drop(self, offer: Offer) -> None:
        """What was asked of it before is answered still: a replica reads in order."""
        for link in self._links.values():
            link.ready.discard(offer.identity)
            link.tell({"do": "drop", "identity": offer.identity})
        offer.close()

    async def _pick(self) -> tuple[Link, Offer]:
        """The replica with the fewest requests, and the version for it to use. Nothing may be awaited between this and
        the request, or the version might be dropped in between."""
        while not self._ready_links():
            try:
                await asyncio.wait_for(self._wait_ready(), READY_SECONDS)
            except TimeoutError:
                raise InfrastructureError("no server is ready") from None
        return min(self._ready_links(), key=lambda link: link.num_asked), self.current

    async def _wait_ready(self) -> None:
        async with self._changed:
            await self._changed.wait_for(self._ready_links)

    async def _wait_settled(self, offer: Offer) -> None:
        """Until a replica has loaded it. Raises `DamagedError` if it is refused."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ready_links(offer) or offer.identity in self._refusals)
        if offer.identity in self._refusals:
            raise DamagedError(self._refusals[offer.identity])

    def _ready_links(self, offer: Offer | None = None) -> list[Link]:
        identity = (offer or self.current).identity
        return [link for link in self._links.values() if identity in link.ready and not link.gone.is_set()]

    async def _tell_change(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _watch(self) -> None:
        """A replica that is stopped, or hangs, is ended: what it was asked another is asked."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for link in list(self._links.values()):
                if link.is_stuck(time.monotonic()):
                    log.warning("replica %d says nothing: it is ended", link.process.pid)
                    link.kill()
