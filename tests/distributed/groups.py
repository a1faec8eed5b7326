"""One node's groups of real ranks, one after another, as its agent sees them: forked, told, killed, started again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, cast
from unittest import mock

import pytest

from tests.unit.tiny import Tiny, exact_arithmetic, make_trainer, tiny_preset
from training.cluster.workers import Hand, Outcome, Workers
from training.cluster.zygote import Worker, Zygote
from training.config import LaunchConfig, ParallelConfig, Preset
from training.control import Order
from training.memory.slots import Header, SlotDescriptors, Slots, create_slots
from training.recipe import Recipe
from training.runs.events import Event
from training.runs.history import committed_steps, events_of
from training.runs.job import Job
from training.runs.record import Member, RunRecord, run_key
from training.s3.objectstore import Store

ENTRY = "tests.distributed.pausing:run"
STEPS = 12
EVERY = 5
PATIENCE_SECONDS = 100.0
"""With ranks that are told to stop: a slow one is not taken for one that cannot."""
VALIDATE_EVERY = 3
TINY = Tiny()
PRESET = tiny_preset(steps=STEPS, checkpoint_every_steps=EVERY, validate_every_steps=VALIDATE_EVERY)
Told = tuple[int, float, str, dict[str, float]]
Calm = tuple[str, list[Told]]
"""State and history of a run that nothing happens to."""


@dataclass(frozen=True)
class Pause:
    """Where a rank waits (tests.distributed.pausing), once it has finished so many steps."""

    place: str
    step: int


class Group:
    """The workers of one token."""

    def __init__(self, job: Job, token: int, node: Node, *, patience_seconds: float, **staying: Any) -> None:
        self._zygote = node.zygote
        self._patience_seconds = patience_seconds
        self._pauses = node.pauses
        self._is_far = node.is_far
        self._sockets = node.sockets
        self.processes: list[Worker] = []
        self.ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        member = Member(node=0, incarnation="i", address="127.0.0.1", port=0)
        record = replace(job.open_run().read(), token=token, members=(member,))
        self.workers = Workers(
            job=job,
            node=0,
            record=record,
            start=self._start,
            slots=node.slots,
            on_end=self.ended.set_result,
            **staying,
        )

    def begin(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            first = replace(self.workers.record.members[0], port=listener.getsockname()[1])
            self.workers.record = replace(self.workers.record, members=(first,))
            self.workers.begin(listener)

    def _start(self, order: dict[str, Any], descriptors: Mapping[str, int]) -> Worker:
        order = {**order, "patience_seconds": self._patience_seconds, "is_far": self._is_far}
        pauses = self._pauses.get(order["local_rank"])
        if not pauses:
            self.processes.append(self._zygote.start(order, descriptors))
        else:
            pause = pauses.pop(0)
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            self._sockets[order["local_rank"]] = ours
            with theirs:
                order = {**order, "place": pause.place, "step": pause.step}
                self.processes.append(self._zygote.start(order, {**descriptors, "pause_fd": theirs.fileno()}))
        return self.processes[-1]

    async def paused(self, *ranks: int) -> None:
        """Once these wait at their places."""
        for rank in ranks:
            await self._hear(rank, b"!")

    async def _hear(self, rank: int, word: bytes) -> None:
        said = await asyncio.get_running_loop().sock_recv(self._sockets[rank], 1)
        assert said == word, f"rank {rank} said {said!r}, or is gone"

    def go_on(self, rank: int) -> None:
        self._sockets[rank].send(b"!")

    def kill(self, rank: int) -> None:
        os.kill(self.pids()[rank], signal.SIGKILL)

    def freeze(self, rank: int) -> None:
        os.kill(self.pids()[rank], signal.SIGSTOP)

    async def order(self, rank: int, order: Order) -> None:
        """Tell this one, which is paused; once it has taken note of it."""
        self.workers._workers[rank].hand.channel.send(order)
        await self._hear(rank, b"o")

    async def waits(self, rank: int, *, step: int = 0) -> None:
        """Once this one has done that many steps, and waits for the others."""
        worker = self.workers._workers[rank]
        while not (worker.is_waiting and worker.step >= step):
            await asyncio.sleep(0.02)

    async def is_out(self, rank: int) -> None:
        """Once this one has left the group, or has ended."""
        worker = self.workers._workers[rank]
        while worker.is_in:
            await asyncio.sleep(0.02)

    async def has_spares(self, number: int) -> None:
        """Once so many processes wait to replace one that dies."""
        while len(self.workers.spares) < number:
            await asyncio.sleep(0.02)

    def pids(self) -> list[int]:
        """Of the group's ranks."""
        return [cast(Worker, worker.hand.process).pid for worker in self.workers._workers]

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def close(self) -> None:
        self.workers.kill()


Act = Callable[[Group], Awaitable[None]]


async def nothing(group: Group) -> None:
    """Let it run."""


@dataclass
class Node:
    """A run, and the memory of this node's ranks."""

    run: RunRecord
    job: Job
    zygote: Zygote
    slots: list[SlotDescriptors] = field(default_factory=lambda: [create_slots() for _ in range(4)])
    hands: dict[int, Hand] = field(default_factory=dict)
    """Processes that stayed, by rank."""
    pauses: dict[int, list[Pause]] = field(default_factory=dict)
    """Of each process that a rank gets, one after another."""
    sockets: dict[int, socket.socket] = field(default_factory=dict)
    """To those that pause."""
    is_far: bool = False
    """Whether ranks keep copies for one another as if each were on a node of its own."""

    def train(
        self,
        num_ranks: int,
        act: Act = nothing,
        *,
        pauses: Mapping[int, Pause] | None = None,
        may_stay: bool = False,
        patience_seconds: float = PATIENCE_SECONDS,
        **launch: Any,
    ) -> Group:
        """A group of so many ranks, under the next token, until all are out of it; `act` is what befalls it. Those of
        its new processes that are told to stop, and could stay, end if they do not leave with so much patience. Of more
        `nodes` all others are away."""
        record = self.run.update(lambda newest: replace(newest, token=newest.token + 1))
        config = LaunchConfig(**{"nodes": 1, "processes_per_node": num_ranks, **launch})
        job = replace(self.job, preset=replace(self.job.preset, launch=config))

        async def follow() -> Group:
            hands = {rank: self.hands.pop(rank) for rank in range(num_ranks) if rank in self.hands}
            self.pauses |= {rank: [pause] for rank, pause in (pauses or {}).items()}
            staying: dict[str, Any] = {"may_stay": may_stay, "hands": hands}
            group = Group(job, record.token, self, patience_seconds=patience_seconds, **staying)
            try:
                async with asyncio.timeout(240):
                    group.begin()
                    await act(group)
                    await group.ended
                    self.hands |= group.workers.hands
                    group.workers.hands = {}
            finally:
                group.close()
            return group

        with mock.patch("training.cluster.workers.STOP_SECONDS", PATIENCE_SECONDS):
            return asyncio.run(follow())

    def lose_memory(self, *ranks: int) -> None:
        """As if they had been on nodes that are lost."""
        for rank in ranks:
            for fd in self.slots[rank]:
                os.close(fd)
            self.slots[rank] = create_slots()

    def reach_store_at(self, endpoint: str) -> None:
        """The ranks do, not this test."""
        self.job = replace(self.job, location=replace(self.job.location, endpoint=endpoint))

    def memories(self) -> list[Header | None]:
        """What is whole in each rank's slots."""
        found = [Slots(slots).newest(self.job.key, 0) for slots in self.slots]
        return [memory.header if memory else None for memory in found]

    def steps_in_memory(self) -> list[int | None]:
        return [header.step if header else None for header in self.memories()]

    def attempts(self) -> list[tuple[int, int, str]]:
        """Of each token: ranks, step, and where that came from."""
        found = [event for event in self.events() if event.kind == "attempt"]
        return [(event.values["world_size"], event.step, event.values["source"]) for event in found]

    def events(self) -> list[Event]:
        return list(events_of(self.run, self.run.read()))

    def told(self) -> list[Told]:
        """The history that counts."""
        return [
            (event.step, event.values["loss"], event.values["samples"], event.values["validation"])
            for event in committed_steps(self.run, self.run.read())
        ]

    def close(self) -> None:
        for hand in self.hands.values():
            hand.end()
        for test in self.sockets.values():
            test.close()
        for pair in self.slots:
            for fd in pair:
                os.close(fd)


def make_node(store: Store, zygote: Zygote, preset: Preset = PRESET, recipe: Recipe = TINY) -> Node:
    key = run_key(recipe=recipe, preset=preset, dataset_digest="d")
    run = RunRecord(store, key)
    run.create_if_missing()
    job = Job(key=key, generation=0, preset=preset, dataset_digest="d", location=store.location)
    return Node(run=run, job=job, zygote=zygote)


def require_same(node: Node, calm: Calm) -> None:
    """The run ended in the state and with the history of `calm`."""
    record = node.run.read()
    assert record.result is not None
    assert (record.result.step, record.result.state_sha256) == (STEPS, calm[0])
    assert node.told() == calm[1]


async def kill_one_of_two(group: Group, victim: int, *, step: int) -> None:
    """Which is paused, once the other has done that many steps, and waits for it."""
    await group.paused(victim)
    await group.waits(1 - victim, step=step)
    group.kill(victim)


async def regroup(group: Group, rank: int = 1) -> None:
    """One rank, which is paused, is told to."""
    await group.paused(rank)
    await group.order(rank, Order(do="regroup"))
    group.go_on(rank)


def calm(*, preset: Preset = PRESET, recipe: Recipe = TINY, steps: int = STEPS) -> Calm:
    """In one process."""
    trainer = make_trainer(preset=preset, recipe=recipe)
    told = []
    with exact_arithmetic():
        for step in range(1, steps + 1):
            outcome = trainer.train_step()
            told.append((step, outcome.loss, outcome.samples, dict(outcome.validation)))
    return trainer.state.state_sha256(), told


def fixtures(preset: Preset = PRESET, recipe: Recipe = TINY, *, is_far: bool = False) -> tuple[Any, Any, Any]:
    """`zygote`, `node` and `calm`, for up to four ranks; the last is of one process, which has all of the state."""

    @pytest.fixture(scope="module")
    def zygote() -> Iterator[Zygote]:
        with closing(Zygote(preset, entry=ENTRY)) as running:
            yield running

    @pytest.fixture
    def node(store: Store, zygote: Zygote) -> Iterator[Node]:
        with closing(make_node(store, zygote, preset, recipe)) as made:
            made.is_far = is_far
            yield made

    @pytest.fixture(scope="module", name="calm")
    def calm_run() -> Calm:
        return calm(preset=replace(preset, parallel=ParallelConfig()), recipe=recipe)

    return zygote, node, calm_run
