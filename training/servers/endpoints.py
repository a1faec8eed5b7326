"""What a process does with a mesh: serve a shard, or train against all of them.

Both hear what comes in the thread that it comes by (training.servers.mailbox).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from training.arithmetic.reduce import Subtree
from training.errors import InfrastructureError
from training.servers.client import Client
from training.servers.mailbox import Mailbox
from training.servers.mesh import Address, Lost, Mesh, Word
from training.servers.protocol import Assignment, Message, Send
from training.servers.stale_protocol import Places


class Machine(Protocol):
    """A server's, without input or output: training.servers.replica, or training.servers.staleness."""

    token: int

    def begin(self, assignment: Any, /) -> list[Send]: ...

    def handle(self, sender: str, message: Message) -> list[Send]: ...


class Speaker(Protocol):
    """A worker's: training.servers.client, or training.servers.staleness."""

    @property
    def is_waiting(self) -> bool:
        """For answers to what it has said."""
        ...

    def handle(self, sender: str, message: Message) -> list[Send]: ...


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The record has a new group."""

    assignment: Assignment | Places
    places: Mapping[str, Address]


class Server:
    """A shard or a replica of one, and its mesh."""

    def __init__(
        self,
        mesh: Mesh,
        machine: Machine,
        on_trouble: Callable[[int, Exception | None], None] = lambda token, maybe_error: None,
    ) -> None:
        """`on_trouble` hears that a peer of this group is lost, or of an error of the machine's own, which is its end:
        nobody else may notice, and all wait for its answer."""
        self.mesh = mesh
        self._machine = machine
        self._on_trouble = on_trouble
        self._is_over = False
        self._mailbox = Mailbox[Begun | Word](self._hear)
        mesh.hear = self._mailbox.put

    def begin(self, begun: Begun) -> None:
        self._mailbox.put(begun)

    def close(self) -> None:
        """What comes from now on changes nothing, and is nobody's trouble."""
        self._is_over = True
        self.mesh.close()

    def freeze(self, *, timeout_seconds: float) -> bool:
        """For ever, between two messages: what the machine acknowledged, it has. False if there was no such moment."""
        return self._mailbox.freeze(timeout_seconds=timeout_seconds)

    def _hear(self, word: Begun | Word) -> None:
        if self._is_over:
            return
        try:
            self._take(word)
        except Exception as error:  # whoever waits for this server raises it
            self._is_over = True
            self._on_trouble(self._machine.token, error)

    def _take(self, word: Begun | Word) -> None:
        if isinstance(word, Begun):
            self.mesh.begin(word.assignment.token, word.places)
            self.mesh.send(self._machine.begin(word.assignment))
            return
        sender, message = word
        if not isinstance(message, Lost):
            self.mesh.send(self._machine.handle(sender, message))
        elif message.token == self._machine.token:
            self._on_trouble(self._machine.token, None)


class PrimaryLost(InfrastructureError):
    """A shard does not answer any more: another group goes on from what its other replicas hold."""


class Remote:
    """All shards, as one worker of a group sees them. Each method returns once all have answered, or raises
    `PrimaryLost`."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        token: int,
        primaries: Sequence[str],
        places: Mapping[str, Address],
        decide: Callable[[Sequence[Any]], Any],
        patience_seconds: float | None = None,
    ) -> None:
        """An answer is waited for no longer than `patience_seconds`."""
        self.token = token
        self._patience_seconds = patience_seconds
        self._mesh = mesh
        self._primaries = primaries
        self._client = Client(token=token, primaries=primaries, decide=decide)
        self._speakers: list[Speaker] = [self._client]
        """Each refuses what is not for it."""
        self._num_heard = 0
        self._ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        """Once all have answered, or never will."""
        self._mailbox = Mailbox[Word](self._hear)
        mesh.begin(token, places)
        mesh.hear = self._mailbox.put

    def pull(self) -> tuple[int, list[Any]]:
        """The newest step, and the parameters of all shards after it. A step that the group before left half done is
        finished first."""
        found = self._answers_to(self._client.pull())
        newest = max(step for step, _ in found)
        if any(step != newest for step, _ in found):
            self.step(newest, [()] * len(found))
            found = self._answers_to(self._client.pull())
        return newest, [values for _, values in found]

    def pull_all(self) -> list[Any]:
        """Snapshots of all shards, which are at the same step."""
        return [values for _, values in self._answers_to(self._client.pull(with_optimizer=True))]

    def step(
        self, step: int, parts: Sequence[Sequence[tuple[Subtree, Any]]], maybe_said: Any = None
    ) -> tuple[Any, list[Any]]:
        """All of it: give each shard its part, the last one first, and `finish`."""
        for shard in reversed(range(len(parts))):
            self.push(step, shard, parts[shard], None if shard else maybe_said)
        return self.finish()

    def push(self, step: int, shard: int, parts: Sequence[tuple[Subtree, Any]], maybe_said: Any = None) -> None:
        """Give a shard this worker's sums, or what it says without any. Never waits."""
        self._mesh.send(self._client.push(step, shard, parts, maybe_said))

    def finish(self) -> tuple[Any, list[Any]]:
        """Once each shard was given its part: what was decided, and the parameters after the step."""
        self._wait()
        found = self._client.values()
        return self._client.maybe_decision, [values for _, values in found]

    def give_up(self) -> None:
        """May be called by another thread: what waits for an answer raises `PrimaryLost`."""
        self._ended.put(PrimaryLost("the group is over"))

    def _hear(self, word: Word) -> None:
        sender, message = word
        self._num_heard += 1
        try:
            if isinstance(message, Message):
                self._handle(sender, message)
            elif message.token == self.token and sender in self._primaries:
                self._ended.put(PrimaryLost(f"{sender} is gone"))
        except Exception as error:  # of a decision: whoever waits for it raises it
            self._ended.put(error)

    def _handle(self, sender: str, message: Message) -> None:
        for speaker in self._speakers:
            was_waiting = speaker.is_waiting
            self._mesh.send(speaker.handle(sender, message))
            if was_waiting and not speaker.is_waiting:
                self._ended.put(None)

    def _answers_to(self, sends: list[Send]) -> list[tuple[int, Any]]:
        self._mesh.send(sends)
        self._wait()
        return self._client.values()

    def _wait(self) -> None:
        """Until all have answered. Raises `PrimaryLost`."""
        num_heard = -1
        while num_heard != self._num_heard:
            num_heard = self._num_heard
            try:
                maybe_error = self._ended.get(timeout=self._patience_seconds)
            except queue.Empty:
                continue
            if maybe_error is not None:
                raise maybe_error
            return
        raise PrimaryLost(f"no server answered for {self._patience_seconds:.0f} s")
