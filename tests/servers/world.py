"""Replicas and workers in a simulated network: each link keeps its order, but may say a thing twice, and chance says
which one is next.

Values are terms instead of numbers, so that what was added up, in which tree, and what it was applied to can be read
from them. Processes die, are cut off, and are replaced at a given event.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from training.arithmetic.reduce import Subtree, fold, owned_range, subtrees
from training.servers.client import Client
from training.servers.protocol import Assignment, Message, Send
from training.servers.replica import Replica

WORD = "what who computes nothing has to say"
FEW_REPLICAS = 2
MOST_EVENTS = 20_000


@dataclass(frozen=True)
class Term:
    """As a tensor, for training.arithmetic.reduce."""

    name: str

    def add_(self, other: Term) -> Term:
        return Term(f"({self.name} {other.name})")


def added(trees: Sequence[Subtree], terms: Sequence[Term]) -> Term:
    return cast(Term, fold(trees, cast(Any, terms)))


class TermState:
    """A shard whose parameters are the digest of all that was applied to them."""

    def __init__(self, shard: int, history: History, name: str) -> None:
        self.step = 0
        self.value = f"shard {shard} at first"
        self._history, self._shard, self._name = history, shard, name

    def fold(self, parts: Sequence[tuple[Subtree, Any]]) -> Term:
        return added([subtree for subtree, _ in parts], [term for _, term in parts])

    def with_said(self, total: Term, said: str) -> Term:
        """It is no part of what is applied."""
        assert said == WORD
        self._history.num_heard += 1
        return total

    def report(self, total: Term) -> str:
        return f"norm of {total.name}"

    def apply(self, total: Term, decision: str) -> None:
        self.step += 1
        self.value = applied(self.value, total, decision)
        self._history.applied(self._shard, self._name, self.step, self.value)

    def values(self) -> str:
        return self.value

    changes = values

    def snapshot(self) -> str:
        return self.value

    def load(self, snapshot: str, step: int) -> None:
        self.value, self.step = snapshot, step


def applied(value: str, total: Term, decision: str) -> str:
    return f"{hash((value, total.name, decision)):x}"


def gradient(step: int, leaf: int, shard: int, values: Sequence[str]) -> Term:
    return Term(f"{hash((step, leaf, shard, tuple(values))):x}")


def decide(reports: Sequence[str]) -> str:
    return f"{hash(tuple(reports)):x}"


class History:
    """What happened, and what of it must not: `require` raises `AssertionError` for the first."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.expected = expected(world.num_shards, world.num_leaves, world.num_steps)
        self.broken: list[str] = []
        self.acknowledged_step = 0
        self.num_heard = 0
        """Words of those that compute nothing, in totals."""

    def applied(self, shard: int, name: str, step: int, value: str) -> None:
        if value != self.expected[step][shard]:
            self.broken.append(f"{name} applied something else in step {step}")
        for other in range(self._world.num_shards):
            if max(self._world.positions(other), default=-1) < 2 * step - 1:
                self.broken.append(f"shard {shard} applied step {step}, and shard {other} does not hold its total")

    def acknowledged(self, token: int, step: int, values: Sequence[str]) -> None:
        """A worker heard from all shards that the step is done."""
        if list(values) != self.expected[step]:
            self.broken.append(f"step {step} was acknowledged with other parameters")
        self.acknowledged_step = max(self.acknowledged_step, step)

    def require(self) -> None:
        assert not self.broken, self.broken[0]


def expected(num_shards: int, num_leaves: int, num_steps: int) -> list[list[str]]:
    """The parameters of all shards after each step, as one process makes them."""
    values = [f"shard {shard} at first" for shard in range(num_shards)]
    found = [values]
    for step in range(1, num_steps + 1):
        totals = [_total(step, range(num_leaves), shard, values) for shard in range(num_shards)]
        decision = decide([f"norm of {total.name}" for total in totals])
        values = [applied(value, total, decision) for value, total in zip(values, totals, strict=True)]
        found.append(values)
    return found


def _total(step: int, leaves: range, shard: int, values: Sequence[str]) -> Term:
    return added(subtrees(leaves), [term for _, term in parts_of(step, leaves, shard, values)])


def parts_of(step: int, leaves: range, shard: int, values: Sequence[str]) -> list[tuple[Subtree, Term]]:
    return [
        (
            tree,
            added(
                [Subtree(leaf, 1) for leaf in range(tree.start, tree.start + tree.size)],
                [gradient(step, leaf, shard, values) for leaf in range(tree.start, tree.start + tree.size)],
            ),
        )
        for tree in subtrees(leaves)
    ]


class Worker:
    """Pulls, then steps until all are done. What a group left half done is finished first."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self._client: Client = world.make_client(token=0, primaries=(), decide=decide)

    def begin(self, token: int, primaries: Sequence[str], leaves: range) -> list[Send]:
        self._leaves = leaves
        self._client = self._world.make_client(token=token, primaries=primaries, decide=decide)
        return self._client.pull()

    @property
    def is_done(self) -> bool:
        return self._client.phase == "idle" and self._client.step == self._world.num_steps

    def handle(self, sender: str, message: Message) -> list[Send]:
        was_idle = self._client.phase == "idle"
        sends = self._client.handle(sender, message)
        return sends if sends or was_idle or self._client.phase != "idle" else self._go_on()

    def _go_on(self) -> list[Send]:
        found = self._client.values()
        newest = max(step for step, _ in found)
        if any(step != newest for step, _ in found):
            return self._push(newest, [()] * len(found))  # all shards hold its total
        values = [value for _, value in found]
        self._world.history.acknowledged(self._client.token, newest, values)
        self._client.step = newest
        if newest == self._world.num_steps:
            return []
        parts = [parts_of(newest + 1, self._leaves, shard, values) for shard in range(len(found))]
        return self._push(newest + 1, parts, None if self._leaves else WORD)

    def _push(self, step: int, parts: Sequence[Any], maybe_said: str | None = None) -> list[Send]:
        return [
            send
            for shard, one in enumerate(parts)
            for send in self._client.push(step, shard, one, None if shard else maybe_said)
        ]


@dataclass
class Fault:
    """At an event: `kill` a process, or have it `cut` off, so that it goes on with the old token for a while."""

    at: int
    victim: str
    """`primary`, `backup` or `worker`, and the number of its shard or place: `primary 0`."""
    kind: str = "kill"
    num_workers_after: int | None = None
    fired: bool = field(default=False, init=False)


class World:
    """`run` goes on until all workers are done."""

    def __init__(
        self,
        *,
        seed: int,
        faults: Iterable[Fault] = (),
        num_shards: int = 2,
        num_replicas: int = FEW_REPLICAS,
        num_workers: int = 2,
        num_speakers: int = 0,
        num_leaves: int = 6,
        num_steps: int = 4,
        make_replica: Callable[..., Replica] = Replica,
        make_client: Callable[..., Client] = Client,
    ) -> None:
        self.num_shards, self.num_leaves, self.num_steps = num_shards, num_leaves, num_steps
        self.make_client = make_client
        self._num_speakers = num_speakers
        """Of the workers, the last ones: they compute nothing."""
        self._make_replica = make_replica
        self._chance = random.Random(seed)
        self._faults = list(faults)
        self._queues: dict[tuple[str, str], deque[Message | Callable[[], list[Send]]]] = {}
        self._numbers = 0
        self.history = History(self)
        self.token = 0
        self.num_events = 0
        self.processes: dict[str, Replica | Worker] = {}
        self.replicas = [[self._new_replica(shard) for _ in range(num_replicas)] for shard in range(num_shards)]
        self.workers = [self._new_worker() for _ in range(num_workers)]
        for names in self.replicas:
            for name in names:
                self._replica(name).fill()
        self._regroup()

    def _replica(self, name: str) -> Replica:
        return cast(Replica, self.processes[name])  # or one with a planted bug

    def positions(self, shard: int) -> list[int]:
        return [self._replica(name).position for name in self.replicas[shard] if name in self.processes]

    def _new_replica(self, shard: int) -> str:
        self._numbers += 1
        name = f"replica {shard}.{self._numbers}"
        state = TermState(shard, self.history, name)
        self.processes[name] = self._make_replica(name, state, num_virtual_workers=self.num_leaves)
        return name

    def _new_worker(self) -> str:
        self._numbers += 1
        name = f"worker {self._numbers}"
        self.processes[name] = Worker(name, self)
        return name

    def _regroup(self) -> None:
        """The record has a new token; each process hears of it in its own time."""
        self.token += 1
        primaries = [names[0] for names in self.replicas]
        num_computing = len(self.workers) - self._num_speakers
        for shard, names in enumerate(self.replicas):
            speakers = () if shard else tuple(self.workers[num_computing:])
            assignment = Assignment(token=self.token, primary=names[0], backups=tuple(names[1:]), speakers=speakers)
            for name in names:
                self._plan("record", name, self._beginning(name, assignment))
        for place, name in enumerate(self.workers):
            leaves = owned_range(place, num_computing, self.num_leaves) if place < num_computing else range(0)
            self._plan("record", name, self._start(name, self.token, primaries, leaves))

    def _beginning(self, name: str, assignment: Assignment) -> Callable[[], list[Send]]:
        return lambda: self._replica(name).begin(assignment)

    def _start(self, name: str, token: int, primaries: Sequence[str], leaves: range) -> Callable[[], list[Send]]:
        def start() -> list[Send]:
            worker = self.processes[name]
            assert isinstance(worker, Worker)
            return worker.begin(token, primaries, leaves)

        return start

    def _plan(self, sender: str, to: str, what: Message | Callable[[], list[Send]]) -> None:
        self._queues.setdefault((sender, to), deque()).append(what)

    def run(self) -> None:
        """Raises `AssertionError` if an invariant breaks, or nothing happens any more before all is done."""
        while not all(self._is_done(name) for name in self.workers):
            self._maybe_strike()
            ready = sorted(link for link, queue in self._queues.items() if queue)
            assert ready, f"nothing happens any more, at event {self.num_events}"
            assert self.num_events < MOST_EVENTS
            sender, to = self._chance.choice(ready)
            what = self._queues[sender, to].popleft()
            self.num_events += 1
            if isinstance(what, Message) and self._chance.random() < 0.05:
                self._queues[sender, to].appendleft(what)  # it comes twice
            if to in self.processes:
                sends = self.processes[to].handle(sender, what) if isinstance(what, Message) else what()
                for send in sends:
                    self._plan(to, send.to, send.message)
            self.history.require()
        for shard, names in enumerate(self.replicas):
            primary = self._replica(names[0])
            assert primary.state.values() == self.history.expected[self.num_steps][shard]

    def _is_done(self, name: str) -> bool:
        worker = self.processes[name]
        return isinstance(worker, Worker) and worker.is_done

    def _maybe_strike(self) -> None:
        for fault in self._faults:
            if fault.at <= self.num_events and not fault.fired:
                fault.fired = True
                self._strike(fault)

    def _strike(self, fault: Fault) -> None:
        kind, _, number = fault.victim.partition(" ")
        place = int(number)
        if kind == "worker":
            self._lose(self.workers[place % len(self.workers)], fault.kind)
            self.workers[place % len(self.workers)] = self._new_worker()
        else:
            names = self.replicas[place % self.num_shards]
            victim = names[0] if kind == "primary" else names[-1]
            self._lose(victim, fault.kind)
            others = [name for name in names if name != victim]
            self.replicas[place % self.num_shards] = [*others, self._new_replica(place % self.num_shards)]
            self._chance.shuffle(self.replicas[place % self.num_shards])
        if fault.num_workers_after:
            for name in self.workers[fault.num_workers_after :]:
                self._lose(name, "kill")
            kept = self.workers[: fault.num_workers_after]
            self.workers = kept + [self._new_worker() for _ in range(fault.num_workers_after - len(kept))]
        self._regroup()

    def _lose(self, name: str, kind: str) -> None:
        """Who is cut off hears of no record, but of all whom it was linked with."""
        if kind == "cut":
            self._queues.pop(("record", name), None)
            return
        del self.processes[name]
        for sender, to in list(self._queues):
            if to == name or (sender == name and self._chance.random() < 0.5):  # what it sent may still be on its way
                del self._queues[sender, to]
