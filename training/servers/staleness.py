"""Bounded staleness: workers that do not wait for one another as long as none is more than `bound` steps ahead of the
slowest. State machines of a shard and of a worker, without input or output.

What a worker reads may lack the others' newest steps, so the result hangs on who was quick: this is no part of exact
mode (`train.staleness` in a preset; docs/parameter-server.md). Invariants:
B1. What a worker reads that has finished step c holds the steps of all workers up to c - bound, and its own up to c.
B2. A step of a place is applied once, in order, whoever sends it how often.
   At a barrier the bound is 0.
B3. A message of an older token changes nothing.
B4. A barrier that a worker wants is the same step for all, and each hears of it before it pushes that step.
(Stale synchronous parallel: Ho et al., NIPS'13; bounded delay: Li et al., OSDI'14, section 3.4.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from training.servers.protocol import Message, Pull, Send, Values
from training.servers.stale_protocol import Fresh, Join, Joined, Places, Read, Update

Phase = Literal["idle", "joining", "reading", "computing"]


class State(Protocol):
    """A shard's parameters."""

    def apply(self, place: int, update: Any) -> None: ...

    def values(self, place: int, clock: int) -> Any:
        """For the worker there, which has finished so many steps."""
        ...

    def snapshot(self) -> Any:
        """And what the optimizer keeps."""
        ...


class StaleShard:
    """`begin` is called with what the run record says, `handle` with what arrives. Links keep their order."""

    def __init__(self, state: State, *, num_places: int, bound: int, clock: int = 0) -> None:
        """All places have finished `clock` steps."""
        self.state = state
        self.bound = bound
        self.clocks = [clock] * num_places
        """Steps of each place that are applied. They outlast its workers."""
        self._answered = clock
        """The greatest number of finished steps of a worker that was given what it asked for."""
        self._barrier = 0
        self.token = 0
        self._places: dict[str, int] = {}
        self._waiting: dict[str, Read] = {}
        """What workers ask for."""
        self._early: list[tuple[str, Message]] = []

    def begin(self, places: Places) -> list[Send]:
        """These have the places from here on, one each."""
        if places.token <= self.token:
            return []
        if len(places.workers) != len(self.clocks):
            raise ValueError(f"{len(places.workers)} workers for {len(self.clocks)} places")
        self.token, self._waiting, self._barrier = places.token, {}, 0
        self._places = {name: place for place, name in enumerate(places.workers)}
        early, self._early = self._early, []
        return [send for sender, message in early for send in self.handle(sender, message)]

    def handle(self, sender: str, message: Message) -> list[Send]:
        if message.token > self.token:
            self._early.append((sender, message))
            return []
        if message.token < self.token:
            return []
        if isinstance(message, Join):
            return [Send(to=sender, message=Joined(token=self.token, clock=self.clocks[self._places[sender]]))]
        if isinstance(message, Update):
            self._take(self._places[sender], message)
        elif isinstance(message, Read):
            self._waiting[sender] = message
            self._want_barrier(message)
        elif isinstance(message, Pull):  # at a barrier, which all pass together
            return [Send(to=sender, message=self._whole())]
        return self._answer_all()

    def _whole(self) -> Values:
        return Values(token=self.token, step=min(self.clocks), values=self.state.snapshot())

    def _take(self, place: int, message: Update) -> None:
        if message.clock == self.clocks[place] + 1:
            self.state.apply(place, message.update)
            self.clocks[place] = message.clock

    def _want_barrier(self, message: Read) -> None:
        """Whoever was answered last is in the next step, and does not know of it: but after that, it will."""
        if message.wants_barrier and self._barrier == 0:
            self._barrier = self._answered + 2

    def _answer_all(self) -> list[Send]:
        """All whose reads are fresh enough by now."""
        ready = {name: read.clock for name, read in self._waiting.items() if self._is_fresh(read)}
        for name in ready:
            del self._waiting[name]
        return [Send(to=name, message=self._fresh(self._places[name], clock)) for name, clock in ready.items()]

    def _fresh(self, place: int, clock: int) -> Fresh:
        self._answered = max(self._answered, clock)
        return Fresh(token=self.token, clock=clock, barrier=self._barrier, values=self.state.values(place, clock))

    def _is_fresh(self, read: Read) -> bool:
        """The reader's own steps came before, on the same link."""
        bound = 0 if read.is_barrier else self.bound
        return min(self.clocks) >= read.clock - bound


class StaleWorker:
    """Of one group. It joins; then, whenever it is `computing`, `push` gives what its next step adds."""

    def __init__(self, *, token: int, shards: Sequence[str]) -> None:
        self.token = token
        self.phase: Phase = "idle"
        self.clock = 0
        """Steps that are finished."""
        self._shards = tuple(shards)
        self._answers: dict[str, Any] = {}

    @property
    def is_waiting(self) -> bool:
        return self.phase in ("joining", "reading")

    @property
    def values(self) -> list[Any]:
        """Of all shards, for the step to come."""
        return [self._answers[name].values for name in self._shards]

    def join(self) -> list[Send]:
        self.phase = "joining"
        return self._say(lambda _: Join(token=self.token))

    @property
    def barrier(self) -> int:
        """The step at which all meet because one of them wants it, or 0."""
        first: int = self._answers[self._shards[0]].barrier
        return first

    def push(self, updates: Sequence[Any], *, is_barrier: bool = False, wants_barrier: bool = False) -> list[Send]:
        """Of the step that it read for, for each shard. It waits for all workers' step of that number at a barrier."""
        self.clock += 1
        sends = self._say(lambda shard: Update(token=self.token, clock=self.clock, update=updates[shard]))
        return sends + self._read(is_barrier, wants_barrier)

    def _read(self, is_barrier: bool = False, wants_barrier: bool = False) -> list[Send]:
        self.phase = "reading"
        read = Read(token=self.token, clock=self.clock, is_barrier=is_barrier, wants_barrier=wants_barrier)
        return self._say(lambda _: read)

    def _say(self, message: Callable[[int], Message]) -> list[Send]:
        self._answers = {}
        return [Send(to=name, message=message(shard)) for shard, name in enumerate(self._shards)]

    def handle(self, sender: str, message: Message) -> list[Send]:
        """Answers of another token, and those to what it asked before, are refused."""
        if message.token != self.token or not self._answers_me(message):
            return []
        self._answers[sender] = message
        if len(self._answers) < len(self._shards):
            return []
        if self.phase == "joining":  # a shard that is further on drops what it has
            self.clock = min(answer.clock for answer in self._answers.values())
            return self._read()
        self.phase = "computing"
        return []

    def _answers_me(self, message: Message) -> bool:
        if self.phase == "joining":
            return isinstance(message, Joined)
        return self.phase == "reading" and isinstance(message, Fresh) and message.clock == self.clock
