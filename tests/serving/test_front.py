"""The front with replicas that are only played, so that they can be as bad as wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tasks.lifecycle.model_file import KeptVersion
from tasks.serving import front as front_module
from tasks.serving.frames import Frame
from tasks.serving.front import MAX_TRIES, Front
from tasks.serving.link import Link, ReplicaGoneError
from tasks.serving.metrics import Metrics
from tasks.serving.offer import Offer
from tests.serving.models import SIGNATURE
from training.errors import DamagedError, InfrastructureError

Behaviour = Callable[["PlayedLink", dict[str, Any]], Awaitable[dict[str, Any]]]


class PlayedLink:
    """Does what `behaviour` says when it is asked."""

    pids = 0

    def __init__(self, behaviour: Behaviour) -> None:
        PlayedLink.pids += 1
        self.process = SimpleNamespace(pid=PlayedLink.pids)
        self.ready: set[str] = set()
        self.gone = asyncio.Event()
        self.num_asked = 0
        self.is_silent = False
        self.told: list[dict[str, Any]] = []
        self._behaviour = behaviour

    async def ask(self, head: dict[str, Any], body: bytes = b"", *, patience_seconds: float) -> Frame:
        asked = asyncio.ensure_future(self._behaviour(self, head))
        gone = asyncio.create_task(self.gone.wait())
        await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
        if self.gone.is_set():
            asked.cancel()
            raise ReplicaGoneError("gone")
        gone.cancel()
        return Frame(1, asked.result(), body)

    def tell(self, head: dict[str, Any]) -> None:
        self.told.append(head)

    def is_stuck(self, now: float) -> bool:
        return self.is_silent

    def kill(self) -> None:
        self.gone.set()

    async def end(self) -> int:
        return -9

    async def close(self) -> None:
        self.gone.set()


async def good(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
    return {"ready": True} if head["do"] == "load" else {"status": 200}


class Played:
    """A front, its links in order of their start, and the offers that it has let go of."""

    def __init__(self, behaviour: Behaviour, *, num_replicas: int = 2) -> None:
        self.links: list[PlayedLink] = []
        self.behaviour = behaviour
        self.closed: list[str] = []
        self.front = Front(num_replicas=num_replicas, metrics=Metrics(), start=self._start)

    async def _start(self) -> Link:
        self.links.append(PlayedLink(self.behaviour))
        return cast(Link, self.links[-1])

    def offer(self, version: str) -> Offer:
        kept = KeptVersion(
            model="m",
            version=version,
            run_key="r",
            weights_sha256="",
            dataset_digest="",
            model_sha256=version,
            num_bytes=0,
            signature=SIGNATURE,
        )
        played = self

        class PlayedOffer(Offer):
            def close(self) -> None:
                played.closed.append(self.kept.version)

        return PlayedOffer(kept=kept, descriptor=0)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(front_module, "LOOK_SECONDS", 0.01)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_what_ends_every_replica_is_given_up() -> None:
    async def dies(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
        if head["do"] == "predict":
            link.kill()
            await asyncio.sleep(60)
        return {"ready": True}

    async def work() -> None:
        played = Played(dies)
        await played.front.start(played.offer("1"))
        with pytest.raises(InfrastructureError, match=f"{MAX_TRIES} servers ended"):
            await played.front.predict(b"")
        assert played.front.num_waiting == 0
        await played.front.close()

    run(work())


def test_a_replica_that_hangs_is_ended_and_its_requests_are_answered() -> None:
    async def hangs_first(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
        if head["do"] == "predict" and link is played.links[0]:
            link.is_silent = True
            await asyncio.sleep(60)
        return await good(link, head)

    played: Played

    async def work() -> None:
        nonlocal played
        played = Played(hangs_first, num_replicas=1)
        await played.front.start(played.offer("1"))
        answer = await played.front.predict(b"")
        assert answer.version == "1"
        assert len(played.links) == 2
        await played.front.close()

    run(work())


def test_a_program_that_kills_is_refused_and_strikes_one_replica_at_a_time() -> None:
    async def dies_of_2(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
        if head["do"] == "load" and head["version"] == "2":
            least_ready.append(played.front.num_ready)
            link.kill()
            await asyncio.sleep(60)
        return await good(link, head)

    played: Played
    least_ready: list[int] = []

    async def work() -> None:
        nonlocal played
        played = Played(dies_of_2, num_replicas=4)
        await played.front.start(played.offer("1"))
        while played.front.num_ready < 4:
            await asyncio.sleep(0)
        with pytest.raises(DamagedError, match="die when they load version 2"):
            await played.front.switch(played.offer("2"))
        assert len(least_ready) >= MAX_TRIES
        assert (await played.front.predict(b"")).version == "1"
        assert played.closed == ["2"]
        await played.front.close()

    run(work())


def test_the_switch_waits_for_all_and_drops_the_old() -> None:
    async def work() -> None:
        played = Played(good)
        await played.front.start(played.offer("1"))
        while played.front.num_ready < 2:
            await asyncio.sleep(0)
        await played.front.switch(played.offer("2"))
        assert (await played.front.predict(b"")).version == "2"
        assert [link.ready for link in played.links] == [{"2:2"}] * 2
        assert [link.told for link in played.links] == [[{"do": "drop", "identity": "1:1"}]] * 2
        assert played.closed == ["1"]
        await played.front.close()

    run(work())


def test_a_first_program_that_kills_is_an_error_at_the_start() -> None:
    async def dies(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
        link.kill()
        await asyncio.sleep(60)
        return {}

    async def work() -> None:
        played = Played(dies, num_replicas=1)
        with pytest.raises(DamagedError, match="die when they load version 1"):
            await played.front.start(played.offer("1"))
        await played.front.close()

    run(work())


def test_a_process_that_cannot_be_started_is_tried_again() -> None:
    class Short(Played):
        num_tries = 0

        async def _start(self) -> Link:
            self.num_tries += 1
            if self.num_tries == 1:
                raise BlockingIOError("too many processes")
            return await super()._start()

    async def work() -> None:
        played = Short(good, num_replicas=1)
        await played.front.start(played.offer("1"))
        assert played.num_tries == 2
        assert (await played.front.predict(b"")).version == "1"
        await played.front.close()

    run(work())


def test_a_replica_that_could_not_load_is_replaced() -> None:
    """Its memory may have been short; the others serve on."""

    async def second_refuses_once(link: PlayedLink, head: dict[str, Any]) -> dict[str, Any]:
        if head["do"] == "load" and len(played.links) == 2 and link is played.links[1]:
            return {"refused": "no memory"}
        return await good(link, head)

    played: Played

    async def work() -> None:
        nonlocal played
        played = Played(good, num_replicas=1)
        await played.front.start(played.offer("1"))
        played.behaviour = second_refuses_once
        played.links[0].kill()
        while len(played.links) < 3 or played.front.num_ready == 0:
            await asyncio.sleep(0)
        assert played.links[1].gone.is_set()
        await played.front.close()

    run(work())
