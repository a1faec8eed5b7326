"""Shards and workers with bounded staleness in a simulated network: chance says which link speaks next, and may say a
thing twice; some workers are slow; some die, or are cut off and go on, and others take their places."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.servers.stale_history import Applied, HasRead, Operation, Seen
from training.servers.protocol import Message, Send
from training.servers.stale_protocol import Fresh, Places
from training.servers.staleness import StaleShard, StaleWorker

SLOWNESS = 0.02
"""How often a slow worker is chosen, where another one is always."""
MOST_EVENTS = 100_000
What = Message | Callable[[], list[Send]]


class Counts:
    """Parameters that are the updates which made them."""

    def __init__(self, shard: int, num_places: int, history: list[Operation]) -> None:
        self._shard, self._history = shard, history
        self._counts = [0] * num_places

    def apply(self, place: int, update: tuple[int, int]) -> None:
        """A step, and the token of who made it."""
        step, token = update
        self._counts[place] += 1
        self._history.append(Applied(self._shard, place, step, token))

    def values(self, place: int, clock: int) -> Seen:
        return tuple(self._counts)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At an event, the worker of a place dies, or is cut off: it goes on with the token that it knows."""

    at: int
    place: int
    is_cut: bool


class StaleWorld:
    """`run` goes on until all places have done all steps. `history` is what was done."""

    def __init__(
        self,
        *,
        seed: int,
        bound: int,
        num_places: int = 4,
        num_shards: int = 2,
        num_steps: int = 25,
        num_slow: int = 1,
        faults: Sequence[Fault] = (),
        make_shard: Callable[..., Any] = StaleShard,
        make_worker: Callable[..., Any] = StaleWorker,
    ) -> None:
        self.history: list[Operation] = []
        self.num_events = self.num_fired = 0
        self._num_steps, self._make_worker = num_steps, make_worker
        self._chance = random.Random(seed)
        self._slow = set(self._chance.sample(range(num_places), num_slow))
        self._faults = sorted(faults, key=lambda fault: fault.at)
        self._shards = {
            f"shard {number}": make_shard(Counts(number, num_places, self.history), num_places=num_places, bound=bound)
            for number in range(num_shards)
        }
        self._queues: dict[tuple[str, str], deque[What]] = {}
        self._workers: dict[str, Any] = {}
        self._place_of: dict[str, int] = {}
        self._token = 0
        self._names = [f"worker {place}" for place in range(num_places)]
        self._regroup()

    def run(self) -> None:
        """Raises `AssertionError` if nothing happens any more before all is done."""
        while not all(self._is_done(name) for name in self._names):
            if self._faults and self._faults[0].at <= self.num_events:
                self._strike(self._faults.pop(0))
            ready = sorted(link for link, queue in self._queues.items() if queue)
            assert ready, f"nothing happens any more, at event {self.num_events}"
            assert self.num_events < MOST_EVENTS
            link = self._chance.choice(ready)
            if self._is_slow(link) and self._chance.random() > SLOWNESS:
                continue
            self.num_events += 1
            self._happen(*link)

    def _is_slow(self, link: tuple[str, str]) -> bool:
        """What a worker says to itself is that it has computed."""
        return link[0] == link[1] and self._place_of[link[0]] in self._slow and len(self._queues) > 1

    def _happen(self, sender: str, to: str) -> None:
        queue = self._queues[sender, to]
        what = queue.popleft()
        if isinstance(what, Message) and self._chance.random() < 0.05:
            queue.appendleft(what)  # it comes twice
        if to in self._shards or to in self._workers:
            sends = what() if callable(what) else self._heard(sender, to, what)
            for send in sends:
                self._plan(to, send.to, send.message)

    def _heard(self, sender: str, to: str, message: Message) -> list[Send]:
        if to in self._shards:
            sends: list[Send] = self._shards[to].handle(sender, message)
            return sends
        worker = self._workers[to]
        was_computing = worker.phase == "computing"
        if isinstance(message, Fresh) and message.token == worker.token and worker.phase == "reading":
            self._note_read(sender, to, message)
        sends = worker.handle(sender, message)
        if worker.phase == "computing" and not was_computing and worker.clock < self._num_steps:
            self._plan(to, to, self._computed(to, worker))
        return sends

    def _note_read(self, sender: str, to: str, message: Fresh) -> None:
        shard = list(self._shards).index(sender)
        self.history.append(HasRead(shard, self._place_of[to], message.clock, message.token, message.values))

    def _computed(self, name: str, worker: Any) -> Callable[[], list[Send]]:
        """It may be in another group by then."""

        def computed() -> list[Send]:
            if self._workers[name] is not worker:
                return []
            sends: list[Send] = worker.push([(worker.clock + 1, worker.token)] * len(self._shards))
            return sends

        return computed

    def _is_done(self, name: str) -> bool:
        worker = self._workers.get(name)
        return worker is not None and worker.phase == "computing" and worker.clock == self._num_steps

    def _strike(self, fault: Fault) -> None:
        self.num_fired += 1
        victim = self._names[fault.place]
        if fault.is_cut:
            self._queues.pop(("record", victim), None)
        else:
            self._workers.pop(victim, None)
            for link in [link for link in self._queues if victim in link]:
                del self._queues[link]
        self._names[fault.place] = f"worker {fault.place}, {self._token}"
        self._regroup()

    def _regroup(self) -> None:
        """The record has a new token; each process hears of it in its own time."""
        self._token += 1
        token, names = self._token, list(self._names)
        for name, shard in self._shards.items():
            self._plan("record", name, self._beginning(shard, token, names))
        for place, name in enumerate(names):
            self._place_of[name] = place
            self._workers.setdefault(name, self._make_worker(token=0, shards=()))
            self._plan("record", name, self._joining(name, token))

    def _beginning(self, shard: Any, token: int, names: list[str]) -> Callable[[], list[Send]]:
        return lambda: list(shard.begin(Places(token=token, workers=tuple(names))))

    def _joining(self, name: str, token: int) -> Callable[[], list[Send]]:
        def join() -> list[Send]:
            self._workers[name] = worker = self._make_worker(token=token, shards=list(self._shards))
            sends: list[Send] = worker.join()
            return sends

        return join

    def _plan(self, sender: str, to: str, what: What) -> None:
        self._queues.setdefault((sender, to), deque()).append(what)
