"""This node's workers of one group: called together, told what to do on the way, and out of it together."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from training.cluster.worker import WorkerOrder
from training.control import EXIT_STOPPED, Call, Channel, Note, Order, Seat
from training.errors import InfrastructureError
from training.memory.slots import SlotDescriptors
from training.runs.failures import of_exit_code, oom_kills
from training.runs.job import Job
from training.runs.record import Departure, Record

STOP_SECONDS = 3.0
"""After which a worker that was told to stop is killed, and what it held in memory is given up."""
SLOT_FIELDS = ("slot_fd_0", "slot_fd_1", "servers_fd")
"""Of a worker's order."""
log = logging.getLogger("training.cluster.agent")


class Process(Protocol):
    """A worker, as whoever starts it gives it."""

    def fileno(self) -> int:
        """Of its pidfd."""
        ...

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...


Start = Callable[[dict[str, Any], Mapping[str, int]], Process]
"""Starts a worker with an order, and file descriptors by the names of their fields in it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a node's workers ended, or left their group."""

    step: int
    is_finished: bool
    maybe_departure: Departure | None


@dataclass(frozen=True, kw_only=True)
class RankSight:
    """A rank, as its agent sees it."""

    rank: int
    step: int
    """The last that it finished."""
    silent_seconds: float
    """Since it gave a sign of life."""
    seconds_since_step: float
    """Or since it came to this group."""
    figures: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Hand:
    """A process that is in no group, and can be called to one."""

    process: Process
    channel: Channel

    def end(self) -> None:
        self.process.kill()
        self.channel.end.close()


def fork(
    start: Start, job: Job, local_rank: int, slots: SlotDescriptors, *, may_stay: bool, is_spare: bool = False
) -> Hand:
    """A process that makes itself ready to be called. Raises `InfrastructureError`."""
    ours, theirs = socket.socketpair()
    order = WorkerOrder(job=job.to_json(), local_rank=local_rank, may_stay=may_stay, is_spare=is_spare)
    with theirs:
        descriptors = {"control_fd": theirs.fileno()} | dict(zip(SLOT_FIELDS, slots, strict=True))
        return Hand(process=start(asdict(order), descriptors), channel=Channel(ours))


@dataclass(kw_only=True)
class _Worker:
    """One rank."""

    hand: Hand
    local_rank: int
    heard_at: float
    step: int = 0
    moved_at: float = 0.0
    """When it last finished a step."""
    slowest_seconds: float = 0.0
    is_waiting: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)
    """What it last said that it had counted."""
    is_condemned: bool = False
    """Its agent killed it, for no fault of its own."""
    is_told_to_stop: bool = False
    is_killed: bool = False
    """It may still say that it left, and be there for a moment."""
    has_left: bool = False
    maybe_failure: Note | None = None
    maybe_code: int | None = None

    @property
    def is_in(self) -> bool:
        return self.maybe_code is None and not self.has_left

    def kill(self) -> None:
        self.is_killed = True
        self.hand.process.kill()

    def failure(self, *, is_out_of_memory: bool) -> Note | None:
        """What it said, or what its exit code says."""
        if self.maybe_code in (0, EXIT_STOPPED) or self.is_condemned:
            return None
        if self.has_left and self.is_told_to_stop:  # its connections were cut for that
            return None
        if self.maybe_failure is not None or self.has_left:
            return self.maybe_failure
        class_name, message = of_exit_code(self.maybe_code or 0, is_out_of_memory=is_out_of_memory)
        return Note(event="failed", step=self.step, class_name=class_name, message=message)


@dataclass(kw_only=True)
class Workers:
    """Those of one group, on this node. `on_end` is called once, when none is in it any more."""

    job: Job
    node: int
    record: Record
    start: Start
    slots: Sequence[SlotDescriptors]
    """Of each local rank."""
    on_end: Callable[[Outcome], None]
    may_stay: bool = False
    """Whether processes may outlast their group."""
    hands: dict[int, Hand] = field(default_factory=dict)
    """By local rank: those who stayed from the group before, then those who stay from this one."""
    spares: dict[int, Hand] = field(default_factory=dict)
    """By local rank: they belong to no group, until one is needed."""
    _workers: list[_Worker] = field(default_factory=list)
    _is_stopping: bool = False
    _has_ended: bool = False
    _looked_at: float = 0.0
    _maybe_hung: Note | None = None
    _oom_kills: int = field(default_factory=oom_kills)
    """Before they began."""

    def begin(self, listener: socket.socket) -> None:
        """Call them. Ranks follow the order of nodes; the first node's `listener` is the group's store."""
        loop = asyncio.get_running_loop()
        hands, self.hands = self.hands, {}
        for local_rank in range(self.job.preset.launch.processes_per_node):
            hand = hands.get(local_rank)
            if hand is not None and hand.process.poll() is not None:  # it ended, and nobody needed it
                hand.channel.end.close()
                hand = None
            hand = hand or self._fork(local_rank)
            worker = _Worker(hand=hand, local_rank=local_rank, heard_at=loop.time(), moved_at=loop.time())
            self._workers.append(worker)
            loop.add_reader(hand.channel.end, self._hear, worker)
            loop.add_reader(hand.process.fileno(), self._bury, worker)
            call = self._call(local_rank)
            with suppress(OSError):  # it is gone, and buried soon
                hand.channel.send(Order(do="join", maybe_call=call), *[listener.fileno()][: call.is_host])

    def _fork(self, local_rank: int, *, is_spare: bool = False) -> Hand:
        slots = self.slots[local_rank]
        return fork(self.start, self.job, local_rank, slots, may_stay=self.may_stay, is_spare=is_spare)

    def _call(self, local_rank: int) -> Call:
        first, per_node = self.record.members[0], self.job.preset.launch.processes_per_node
        position = [member.node for member in self.record.members].index(self.node)
        return Call(
            seat=Seat(
                rank=position * per_node + local_rank,
                local_rank=local_rank,
                world_size=len(self.record.members) * per_node,
                token=self.record.token,
            ),
            record=self.record,
            store_address=first.address,
            store_port=first.port,
            is_host=position == local_rank == 0,
        )

    def sights(self, now: float) -> list[RankSight]:
        """What is known of each rank here; `now` is the loop's clock."""
        return [
            RankSight(
                rank=self._call(worker.local_rank).seat.rank,
                step=worker.step,
                silent_seconds=now - worker.heard_at,
                seconds_since_step=now - worker.moved_at,
                figures=worker.figures,
            )
            for worker in self._workers
        ]

    def ask(self, order: Order) -> None:
        for worker in self._workers:
            with suppress(OSError):  # it is gone, and buried soon
                worker.hand.channel.send(order)

    def stop(self) -> None:
        """At once; whoever does not leave, or stop, is killed."""
        if not self._is_stopping:
            self._is_stopping = True
            for worker in self._workers:
                worker.is_told_to_stop = worker.is_in
            self.ask(Order(do="stop"))
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._kill_late)

    def _kill_late(self) -> None:
        for worker in self._workers:
            if worker.is_in:
                worker.is_condemned = True
                worker.kill()

    def kill(self) -> None:
        """All of them, and those who stayed."""
        self._kill_late()
        for hand in (*self.hands.values(), *self.spares.values()):
            hand.end()

    def kill_hung(self, now: float, *, hang_seconds: float) -> None:
        """Whoever gives no sign of life, or does not come to the end of a step that all others wait in."""
        if now - self._looked_at > hang_seconds / 2:  # this agent was stopped itself, and has heard nothing
            for worker in self._workers:
                worker.heard_at = worker.moved_at = now
        self._looked_at = now
        for worker in self._workers:
            if worker.is_in and (reason := _hang(worker, now, hang_seconds)):
                log.warning("node %d: step %d: %s", self.node, worker.step + 1, reason)
                self._maybe_hung = Note(event="failed", step=worker.step, class_name="Hung", message=reason)
                worker.kill()

    def _hear(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        try:
            for note in worker.hand.channel.notes():
                _take(worker, note, loop.time())
        except (EOFError, OSError):
            loop.remove_reader(worker.hand.channel.end)
        if worker.slowest_seconds:  # it has finished a step
            self._maybe_add_spare(worker.local_rank)
        if worker.has_left:
            self._look_whether_all_are_out()

    def _bury(self, worker: _Worker) -> None:
        loop = asyncio.get_running_loop()
        worker.maybe_code = worker.hand.process.poll()
        if worker.maybe_code is None:
            return  # its exit code is on the way
        loop.remove_reader(worker.hand.process.fileno())
        worker.hand.channel.end.setblocking(False)
        with suppress(EOFError, OSError):  # what it said last
            while True:
                for note in worker.hand.channel.notes():
                    _take(worker, note, loop.time())
        loop.remove_reader(worker.hand.channel.end)
        worker.hand.channel.end.close()
        self._look_whether_all_are_out()  # first: a fork takes a moment
        if worker.maybe_code != 0:
            self._replace(worker.local_rank)

    def _replace(self, local_rank: int) -> None:
        """By a spare, or by a process that makes itself ready while the next group is found."""
        spare = self.spares.pop(local_rank, None)
        if spare is not None and spare.process.poll() is None:
            self.hands[local_rank] = spare
        elif self.may_stay:
            with suppress(InfrastructureError):  # who begins the next group is told
                self.hands[local_rank] = self._fork(local_rank)

    def _maybe_add_spare(self, local_rank: int) -> None:
        """Once there is nothing more urgent to do."""
        if self.may_stay and self.job.preset.launch.keep_spares and local_rank not in self.spares:
            with suppress(InfrastructureError):  # then there is none
                self.spares[local_rank] = self._fork(local_rank, is_spare=True)

    def _look_whether_all_are_out(self) -> None:
        if not any(worker.is_in for worker in self._workers):
            self._end()
        elif any(worker.has_left or worker.maybe_code for worker in self._workers):
            self.stop()

    def _end(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        loop = asyncio.get_running_loop()
        for worker in self._workers:
            if worker.maybe_code is None:
                loop.remove_reader(worker.hand.process.fileno())
                loop.remove_reader(worker.hand.channel.end)
                if worker.is_killed:
                    worker.hand.end()
                else:
                    self.hands[worker.local_rank] = worker.hand
        is_out_of_memory = oom_kills() > self._oom_kills
        found = (worker.failure(is_out_of_memory=is_out_of_memory) for worker in self._workers)
        failures = [failure for failure in found if failure]
        step = max(worker.step for worker in self._workers)
        is_finished = all(worker.maybe_code == 0 for worker in self._workers)
        self.on_end(Outcome(step=step, is_finished=is_finished, maybe_departure=self._departure(failures)))

    def _departure(self, failures: list[Note]) -> Departure | None:
        """Why this node leaves the group: what failed by itself goes before what failed for the loss of a peer."""
        if self._maybe_hung is not None:
            failures = [self._maybe_hung]
        if not failures:
            return None
        worst = min(failures, key=_blame)
        log.warning("node %d left token %d: %s", self.node, self.record.token, worst.message)
        return Departure(
            token=self.record.token,
            node=self.node,
            cause=worst.message,
            step=worst.step,
            class_name=worst.class_name,
            records=worst.records,
        )


def _blame(note: Note) -> tuple[bool, ...]:
    """What says most comes first."""
    return not note.records, note.class_name == "PeerLost", note.class_name == "Exception"


def _take(worker: _Worker, note: Note, now: float) -> None:
    worker.heard_at = now
    match note.event:
        case "failed":
            worker.maybe_failure = note
        case "left":
            worker.has_left, worker.step = True, note.step
            worker.maybe_failure = note if note.class_name else None
        case "beat":
            worker.is_waiting = note.is_waiting
            worker.figures = worker.figures if note.figures is None else note.figures
        case "began":
            worker.step, worker.moved_at = note.step, now
        case "step":
            worker.slowest_seconds = max(worker.slowest_seconds, now - worker.moved_at)
            worker.step, worker.moved_at, worker.is_waiting = note.step, now, False


def _hang(worker: _Worker, now: float, hang_seconds: float) -> str:
    """Why a worker counts as hung; empty if it does not. A first step may take as long as it likes."""
    silent, stuck = now - worker.heard_at, now - worker.moved_at
    if silent > hang_seconds:
        return f"no sign of life from a worker for {silent:.1f} s"
    is_due = worker.slowest_seconds > 0 and stuck > hang_seconds + 10 * worker.slowest_seconds
    if is_due and not worker.is_waiting:
        return (
            f"a worker does not come to the end of its step: {stuck:.1f} s, the slowest before took"
            f" {worker.slowest_seconds:.1f} s"
        )
    return ""
