"""Links between agents: real sockets, and strangers who would like to speak too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import suppress

import pytest

from training.cluster.links import Links, Place
from training.cluster.protocol import Event, Heard, Linked, Status, Unlinked
from training.runs.record import Member

ADDRESS = "127.0.0.1"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that is made again for a slow handshake would be counted twice."""
    monkeypatch.setattr("training.cluster.links.HANDSHAKE_SECONDS", 120.0)


class Agent:
    """What an agent hears on its links."""

    def __init__(self, name: str, secret: str = "secret") -> None:
        self.name = name
        self.events: list[Event] = []
        self.links = Links(name, secret=secret, on_event=self.events.append)
        self.port = 0

    async def listen(self) -> Agent:
        self.port = await self.links.listen(ADDRESS)
        return self

    def place(self, node: int = 0) -> Place:
        return Place(node=node, incarnation=self.name, address=ADDRESS, port=self.port)

    def status(self, token: int) -> Status:
        return Status(
            member=Member(node=0, incarnation=self.name, address=ADDRESS, port=1),
            token=token,
            phase="idle",
            reaches=("x",),
            sees_store=True,
            is_leaving=False,
            step=4,
            maybe_departure=None,
        )

    async def expect(self, *events: Event) -> None:
        await until(lambda: all(event in self.events for event in events))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    asyncio.run(test())


def test_two_agents_hear_one_another() -> None:
    async def test() -> None:
        a, b = await Agent("a").listen(), await Agent("b").listen()
        a.links.dial({1: b.place()})
        await a.expect(Linked(incarnation="b"))
        await b.expect(Linked(incarnation="a"))
        a.links.tell(a.status(3))
        b.links.tell(b.status(5))
        await a.expect(Heard(status=b.status(5)))
        await b.expect(Heard(status=a.status(3)))
        await b.links.close()
        await a.expect(Unlinked(incarnation="b"))
        await a.links.close()

    run(test)


def test_who_dials_both_ways_is_linked_once() -> None:
    async def test() -> None:
        a, b = await Agent("a").listen(), await Agent("b").listen()
        a.links.dial({1: b.place()})
        b.links.dial({0: a.place()})
        await a.expect(Linked(incarnation="b"))
        a.links.tell(a.status(3))
        await b.expect(Linked(incarnation="a"), Heard(status=a.status(3)))
        assert a.events.count(Linked(incarnation="b")) == 1
        assert b.events.count(Heard(status=a.status(3))) == 1
        await a.links.close()
        await b.links.close()

    run(test)


def test_a_dropped_link_is_made_again() -> None:
    async def test() -> None:
        a, b = await Agent("a").listen(), await Agent("b").listen()
        a.links.dial({1: b.place()})
        await b.expect(Linked(incarnation="a"))
        b.links.unlink("a")
        await a.expect(Unlinked(incarnation="b"))
        await until(lambda: b.events.count(Linked(incarnation="a")) == 2)
        await a.links.close()
        await b.links.close()

    run(test)


def test_who_does_not_know_the_secret_is_not_linked() -> None:
    async def test() -> None:
        a, stranger = await Agent("a").listen(), await Agent("b", secret="guess").listen()
        stranger.links.dial({0: a.place()})
        a.links.dial({1: stranger.place()})
        friend = await Agent("c").listen()
        friend.links.dial({0: a.place()})
        await a.expect(Linked(incarnation="c"))
        assert stranger.events == []
        assert a.events == [Linked(incarnation="c")]
        for agent in (a, stranger, friend):
            await agent.links.close()

    run(test)


def test_who_repeats_what_it_is_told_is_not_linked() -> None:
    """As one between two ends of the same agent would."""

    async def test() -> None:
        a, friend = await Agent("a").listen(), await Agent("c").listen()
        a.links.dial({0: Place(node=0, incarnation="b", address=ADDRESS, port=a.port)})
        friend.links.dial({0: a.place()})
        await a.expect(Linked(incarnation="c"))
        assert a.events == [Linked(incarnation="c")]
        for agent in (a, friend):
            await agent.links.close()

    run(test)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b"{}\n",
        json.dumps({"incarnation": "b", "nonce": "n"}).encode() + b"\n" + b"0" * 64 + b" {}\n",
        b"x" * (2 << 20),
    ],
)
def test_what_a_stranger_says_ends_only_the_strangers_connection(said: bytes) -> None:
    async def test() -> None:
        a = await Agent("a").listen()
        reader, writer = await asyncio.open_connection(ADDRESS, a.port)
        writer.write(said)
        writer.write_eof()
        with suppress(ConnectionResetError):
            async with asyncio.timeout(120):
                await reader.read()
        assert a.events == []
        friend = await Agent("c").listen()
        friend.links.dial({0: a.place()})
        await a.expect(Linked(incarnation="c"))
        await a.links.close()
        await friend.links.close()

    run(test)


def test_a_repeated_or_changed_message_ends_the_link() -> None:
    """Whoever sits between two agents can cut their link, and nothing else."""

    async def test() -> None:
        a, b = await Agent("a").listen(), await Agent("b").listen()
        changes = iter([lambda line: line, lambda line: line, lambda line: line.replace(b'"token":3', b'"token":4')])

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(ADDRESS, b.port)
            answers = asyncio.create_task(pump(there, writer))
            while line := await reader.readline():
                back.write(next(changes)(line))
            answers.cancel()

        async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(1 << 16):
                writer.write(data)
            writer.close()

        server = await asyncio.start_server(between, ADDRESS, 0)
        port = server.sockets[0].getsockname()[1]
        a.links.dial({1: Place(node=1, incarnation="b", address=ADDRESS, port=port)})
        await b.expect(Linked(incarnation="a"))
        a.links.tell(a.status(3))
        await b.expect(Unlinked(incarnation="a"))
        assert not any(isinstance(event, Heard) for event in b.events)
        server.close()
        await a.links.close()
        await b.links.close()

    run(test)
