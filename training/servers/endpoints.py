"""What a process does with a mesh: serve a replica, or train against all shards."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from training.arithmetic.reduce import Subtree
from training.errors import InfrastructureError
from training.servers.client import Client
from training.servers.mesh import Address, Lost, Mesh
from training.servers.protocol import Assignment, Message, Send
from training.servers.stale_protocol import Places


class Server(Protocol):
    """A state machine: training.servers.replica, or training.servers.staleness."""

    token: int

    def begin(self, assignment: Any, /) -> list[Send]: ...

    def handle(self, sender: str, message: Message) -> list[Send]: ...


class Speaker(Protocol):
    """A worker's state machine: training.servers.client, or training.servers.staleness."""

    @property
    def phase(self) -> str: ...

    def handle(self, sender: str, message: Message) -> list[Send]: ...


@dataclass(frozen=True, kw_only=True)
class Begun:
    """Put into a server's inbox: the record has a new group."""

    assignment: Assignment | Places
    places: Mapping[str, Address]


def serve(
    mesh: Mesh,
    server: Server,
    changes: queue.SimpleQueue[Begun | None],
    on_trouble: Callable[[int, Exception | None], None] = lambda token, maybe_error: None,
    maybe_lock: threading.Lock | None = None,
) -> None:
    """Until `changes` gives None. Whoever puts something there calls `wake`. Whoever has the lock meanwhile sees the
    server between two messages: what it acknowledged, it has.

    `on_trouble` hears that a peer of this group is lost, or of an error of the replica's own, which is its end: nobody
    else may notice, and all wait for its answer.
    """
    while True:
        sender, message = mesh.inbox.get()
        try:
            with maybe_lock or nullcontext():
                if not _has_begun(mesh, server, changes):
                    return
                if not isinstance(message, Lost):
                    mesh.send(server.handle(sender, message))
                elif message.token == server.token and sender != mesh.name:
                    on_trouble(server.token, None)
        except Exception as error:  # whoever waits for this server raises it
            on_trouble(server.token, error)
            return
        del message  # or it would keep its memory until the next one comes


def _has_begun(mesh: Mesh, server: Server, changes: queue.SimpleQueue[Begun | None]) -> bool:
    """With the newest group there is; False once there will be none."""
    while not changes.empty():
        begun = changes.get()
        if begun is None:
            return False
        mesh.begin(begun.assignment.token, begun.places)
        mesh.send(server.begin(begun.assignment))
    return True


def wake(mesh: Mesh) -> None:
    """Have `serve` look at its changes."""
    mesh.inbox.put((mesh.name, Lost(token=0)))


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
        mesh.begin(token, places)
        self._client = Client(token=token, primaries=primaries, decide=decide)

    def pull(self) -> tuple[int, list[Any]]:
        """The newest step, and the parameters of all shards after it. A step that the group before left half done is
        finished first."""
        found = self._until_answered(self._client.pull())
        newest = max(step for step, _ in found)
        if any(step != newest for step, _ in found):
            self._until_answered(self._client.push(newest, [()] * len(found)))
            found = self._until_answered(self._client.pull())
        return newest, [values for _, values in found]

    def pull_all(self) -> list[Any]:
        """Snapshots of all shards, which are at the same step."""
        return [values for _, values in self._until_answered(self._client.pull(with_optimizer=True))]

    def step(
        self, step: int, parts: Sequence[Sequence[tuple[Subtree, Any]]], maybe_said: Any = None
    ) -> tuple[Any, list[Any]]:
        """Give this worker's sums, for each shard, or what it says without any; get what was decided, and the
        parameters after the step."""
        found = self._until_answered(self._client.push(step, parts, maybe_said))
        return self._client.maybe_decision, [values for _, values in found]

    def give_up(self) -> None:
        """May be called by another thread: what waits for an answer raises `PrimaryLost`."""
        self._mesh.inbox.put((self._primaries[0], Lost(token=self.token)))

    def _until_answered(self, sends: list[Send]) -> list[tuple[int, Any]]:
        self._follow(self._client, sends, "idle")
        return self._client.values()

    def _follow(self, machine: Speaker, sends: list[Send], end: str) -> None:
        """What it says, and what comes of that, until it is in that phase."""
        self._mesh.send(sends)
        while machine.phase != end:
            try:
                sender, message = self._mesh.inbox.get(timeout=self._patience_seconds)
            except queue.Empty:
                raise PrimaryLost(f"no server answered for {self._patience_seconds:.0f} s") from None
            if isinstance(message, Message):
                self._mesh.send(machine.handle(sender, message))
            elif message.token == self.token and sender in self._primaries:
                raise PrimaryLost(f"{sender} is gone")
