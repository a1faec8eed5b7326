"""The simulated shell around the real `Node`: what the real agent does with sockets, S3 and processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from tests.simulation.clock import Clock
from tests.simulation.network import Connection
from tests.simulation.store import unchanged
from tests.simulation.workers import Memory, Worker
from training.cluster import membership
from training.cluster.node import Node
from training.cluster.protocol import (
    Action,
    AskWorkers,
    Event,
    Leave,
    Preempted,
    Propose,
    ReadRecord,
    RecordSeen,
    Renew,
    StartWorkers,
    StopWorkers,
    Tell,
    Tick,
    Timing,
    Unlink,
    WorkersEnded,
)
from training.runs.record import Departure, Member, Record

if TYPE_CHECKING:
    from tests.simulation.world import World

TIMING = Timing(
    beat=1.0, silence=3.0, start=6.0, gather=2.0, join=3.0, batch=0.2, poll=2.0, retry=0.5, renew=3.0, takeover=14.0
)
"""Coarse beats, so that most events mean something; the proportions are those of the real one."""
TICK = 1.0
STOP = 3.0
"""After which workers that do not stop are killed."""


class SimulatedAgent:
    """One incarnation of a node's agent, on one host."""

    __slots__ = (
        "clock",
        "closing",
        "frozen",
        "frozen_at",
        "hangs",
        "has_left",
        "host",
        "idle_since",
        "index",
        "is_alive",
        "is_preempted",
        "linked_since",
        "links",
        "maybe_memory",
        "maybe_worker",
        "memory_lost_token",
        "name",
        "node",
        "number",
        "placed_at",
        "started_tokens",
        "waiting",
        "was_disturbed",
        "world",
    )

    def __init__(self, world: World, *, number: int, host: int, index: int, clock: Clock) -> None:
        self.world = world
        self.number = number
        """Of the node."""
        self.host = host
        """The machine; a node's replacement has another one."""
        self.index = index
        """Of this incarnation, among all."""
        self.name = f"{number}{'abcdefghijklmnopqrstuvwxyz'[index % 26]}{index}"
        self.clock = clock
        self.is_alive = True
        self.has_left = False
        self.is_preempted = False
        self.frozen = 0
        """By how many faults."""
        self.frozen_at = -inf
        """When it last was; infinity: it still is."""
        self.hangs = False
        """Its workers will not stop when told to."""
        self.waiting: list[Callable[[], None]] = []
        """What happened while it was frozen."""
        self.links: dict[str, Connection] = {}
        self.closing: list[Connection] = []
        self.maybe_worker: Worker | None = None
        self.maybe_memory: Memory | None = None
        self.memory_lost_token = -1
        """The last whose workers were killed here."""
        self.started_tokens: set[int] = set()
        self.placed_at = self.idle_since = self.linked_since = world.agenda.now
        self.was_disturbed = False
        """A fault struck here."""
        self.node = Node(
            me=self._fresh_member(),
            num_nodes=world.num_nodes,
            min_nodes=world.min_nodes,
            nodes_per_replica=world.nodes_per_replica,
            generation=0,
            max_restarts=world.max_restarts,
            timing=TIMING,
            since=clock(),
        )
        world.plan(0.0, self._tick)

    @property
    def is_frozen(self) -> bool:
        return self.frozen > 0

    def _fresh_member(self) -> Member:
        return Member(node=self.number, incarnation=self.name, address="", port=self.world.fresh_port())

    # ---- events in -----------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self.is_alive:
            if not self.frozen:
                self.deliver(Tick())
                self.world.invariants.on_tick(self)
            self.world.plan(TICK, self._tick)

    def deliver(self, event: Event) -> None:
        if not self.is_alive:
            return
        if self.frozen:
            self.waiting.append(partial(self.deliver, event))
            return
        world = self.world
        world.note(self.index, event)
        if world.tracing:
            world.trace_event(self, event)
        phase = self.node.phase
        for action in self.node.handle(event, self.clock()):
            self._act(action)
        if self.node.phase != phase:
            self.idle_since = world.agenda.now
        if world.aims:
            world.look_for_aims(self)

    def preempt(self) -> None:
        self.is_preempted = True
        self.deliver(Preempted())

    def wake(self) -> None:
        """Timers first or sockets first, as it happens."""
        if self.frozen or not self.is_alive:
            return
        if self.world.random() < 0.5:
            self.deliver(Tick())
        waiting, self.waiting = self.waiting, []
        for call in waiting:
            call()

    # ---- actions out ---------------------------------------------------------------------------------------------

    def _act(self, action: Action) -> None:
        world = self.world
        if world.tracing and not isinstance(action, Tell):
            world.trace_action(self, action)
        match action:
            case Tell():
                world.network.tell(self, action.status)
            case Unlink():
                world.network.close(self, action.incarnation)
            case ReadRecord():
                world.store.ask(self.host, unchanged, self._answered)
            case Propose():
                world.store.ask(
                    self.host, lambda record: membership.begin_group(record, action.proposal), self._answered
                )
            case Renew():
                world.store.ask(self.host, lambda record: membership.renew(record, action.token), self._answered)
            case StartWorkers():
                self._start(action.record)
            case StopWorkers():
                self._stop()
            case AskWorkers():
                if self.maybe_worker is not None:
                    world.invariants.on_asked(self, action.to)
                    self.maybe_worker.group.ask(action.to)
            case Leave():
                world.invariants.on_leave(self, is_preempted=action.is_preempted)
                self.has_left = True
                world.process_ends(self)

    def _answered(self, maybe_record: Record | None) -> None:
        self.deliver(RecordSeen(maybe_record=maybe_record))

    # ---- workers -------------------------------------------------------------------------------------------------

    def _start(self, record: Record) -> None:
        self.world.invariants.on_start(self, record)
        self.started_tokens.add(record.token)
        worker = Worker(self, self.maybe_memory)
        self.maybe_worker, self.maybe_memory = worker, None
        self.world.group_of(record).join(worker)

    def _stop(self) -> None:
        self.world.invariants.on_stop(self)
        worker = self.maybe_worker
        if worker is None or not worker.is_alive:
            return  # its end is on its way
        if self.hangs or worker.is_frozen:
            self.hangs = False
            self.world.plan(STOP, self.worker_ends, worker, None, True)
        else:
            self.world.plan(0.05 + 0.3 * self.world.random(), self.worker_ends, worker)

    def worker_ends(
        self,
        worker: Worker,
        maybe_departure: Departure | None = None,
        is_killed: bool = False,
        is_finished: bool = False,
    ) -> None:
        """What it held in memory is kept, unless it was killed. The agent finds out a little later."""
        if not worker.is_alive:
            return
        if worker.is_frozen and not is_killed:
            worker.on_wake.append(partial(self.worker_ends, worker, maybe_departure, is_killed, is_finished))
            return
        worker.is_alive = False
        self.maybe_memory = None if is_killed else worker.maybe_memory
        if is_killed:
            self.memory_lost_token = worker.group.token
        step = worker.maybe_memory.step if worker.maybe_memory and not is_killed else 0
        worker.group.lost(worker)
        self.world.plan(0.1 * self.world.random(), self._tell_end, worker, step, is_finished, maybe_departure)

    def _tell_end(self, worker: Worker, step: int, is_finished: bool, maybe_departure: Departure | None) -> None:
        if self.frozen and self.is_alive:
            self.waiting.append(partial(self._tell_end, worker, step, is_finished, maybe_departure))
            return
        if not self.is_alive:
            return
        self.maybe_worker = None
        self.deliver(
            WorkersEnded(me=self._fresh_member(), step=step, is_finished=is_finished, maybe_departure=maybe_departure)
        )
