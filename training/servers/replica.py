"""One replica of one shard, as a state machine without input or output.

Invariants (docs/parameter-server.md says why they hold):
R1. A step's total is applied once, whoever sends it how often.
R2. What a primary acknowledges (`Held`, `Values`) is on every replica that was not being filled anew.
R3. A message of an older token changes nothing.
R4. No shard applies a step before every shard holds its total: a decision needs the reports of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from training.arithmetic.reduce import Subtree
from training.servers.protocol import (
    Apply,
    Assignment,
    Commit,
    Copy,
    Decided,
    Fetch,
    Held,
    Hold,
    Message,
    Pull,
    Push,
    Reached,
    Send,
    Standing,
    Values,
)


class State(Protocol):
    """A shard's parameters and optimizer (training.servers.arithmetic has the real one)."""

    step: int

    def fold(self, parts: list[tuple[Subtree, Any]]) -> Any:
        """The total, from subtrees that cover all virtual workers, from left to right."""
        ...

    def with_said(self, total: Any, said: Any) -> Any:
        """The total and what a worker without virtual workers says."""
        ...

    def report(self, total: Any) -> Any: ...

    def apply(self, total: Any, decision: Any) -> None:
        """One step further."""
        ...

    def values(self) -> Any: ...

    def changes(self) -> Any:
        """What the last step changed of the values."""
        ...

    def snapshot(self) -> Any: ...

    def load(self, snapshot: Any, step: int) -> None: ...


class Replica:
    """`begin` is called with what the run record says, `handle` with what arrives. Links keep the order of what is sent
    between two processes of one token; messages that come before their token is known wait for it.

    A new replica has nothing (its position is -1) until a copy comes or, if no replica has anything, until `fill` is
    called with the state as it begins or as a checkpoint has it.
    """

    def __init__(self, name: str, state: State, *, num_virtual_workers: int) -> None:
        self.name = name
        self.state = state
        self.token = 0
        self._is_filled = False
        self._num_virtual_workers = num_virtual_workers
        self._maybe_total: Any = None
        """Of step + 1."""
        self._maybe_decision: Any = None
        """That the last step was applied with."""
        self._maybe_assignment: Assignment | None = None
        self._early: list[tuple[str, Message]] = []
        self._forget_group()

    def _forget_group(self) -> None:
        self._parts: dict[Subtree, Any] = {}
        self._said: dict[str, Any] = {}
        """By whom."""
        self._positions: dict[str, int] = {}
        """Of the replicas that are in step with this primary: only these are waited for."""
        self._standings: dict[str, int] = {}
        self._is_ready = False
        self._asking: dict[str, Message] = {}
        """Workers that wait for an answer, and what they said."""

    @property
    def position(self) -> int:
        if not self._is_filled:
            return -1
        return 2 * self.state.step + (self._maybe_total is not None)

    @property
    def is_primary(self) -> bool:
        return self._maybe_assignment is not None and self._maybe_assignment.primary == self.name

    def fill(self) -> None:
        """The state holds what all shards begin with."""
        self._is_filled = True
        self._maybe_total = self._maybe_decision = None

    def copy(self) -> Copy:
        """All that it has."""
        return Copy(
            token=self.token,
            position=self.position,
            snapshot=self.state.snapshot(),
            maybe_total=self._maybe_total,
            maybe_decision=self._maybe_decision,
        )

    def take(self, copy: Copy) -> None:
        """Become that one, if it has come further."""
        if copy.position > self.position:
            with self._changing():
                self.state.load(copy.snapshot, copy.position // 2)
            self._maybe_total, self._maybe_decision = copy.maybe_total, copy.maybe_decision

    @property
    def is_lost(self) -> bool:
        """Whether no replica of the shard holds anything: all shards must begin anew from a checkpoint."""
        return self.is_primary and not self._is_ready and self._are_all_heard() and self.position < 0

    def begin(self, assignment: Assignment) -> list[Send]:
        """A new group. What was gathered for a step that is not whole is forgotten: it will be sent again."""
        if assignment.token <= self.token:
            return []
        self.token, self._maybe_assignment = assignment.token, assignment
        self._forget_group()
        if self.is_primary:
            sends = self._maybe_get_ready()
        else:
            sends = [self._to(assignment.primary, Standing, position=self.position)]
        early, self._early = self._early, []
        return sends + [send for sender, message in early for send in self.handle(sender, message)]

    def handle(self, sender: str, message: Message) -> list[Send]:
        if message.token > self.token:
            self._early.append((sender, message))
            return []
        if message.token < self.token:
            return []
        handlers: dict[type[Message], Callable[[str, Any], list[Send]]] = {
            Push: self._ask,
            Apply: self._ask,
            Pull: self._ask,
            Standing: self._hear_standing,
            Hold: self._hold,
            Commit: self._commit,
            Fetch: lambda sender, message: [self._copy_to(sender)],
            Copy: self._take_copy,
            Reached: self._hear_reached,
        }
        return handlers[type(message)](sender, message)

    def _to(self, name: str, kind: type[Message], **values: Any) -> Send:
        return Send(to=name, message=kind(token=self.token, **values))

    # ---- a primary begins --------------------------------------------------------------------------------------------

    def _hear_standing(self, sender: str, message: Standing) -> list[Send]:
        self._standings[sender] = message.position
        return self._maybe_get_ready()

    def _maybe_get_ready(self) -> list[Send]:
        """Once all backups said how far they are: from the one who is farthest."""
        if self._is_ready or not self._are_all_heard():
            return []
        ahead = max(self._standings, key=lambda name: self._standings[name], default=self.name)
        if self._standings.get(ahead, -1) > self.position:
            return [self._to(ahead, Fetch)]
        if self.position < 0:
            return []
        self._is_ready = True
        sends = []
        for name, position in self._standings.items():
            if position == self.position:
                self._positions[name] = position
            else:
                sends.append(self._copy_to(name))
        return sends + self._answer_all()

    def _are_all_heard(self) -> bool:
        assert self._maybe_assignment is not None
        return set(self._standings) == set(self._maybe_assignment.backups)

    def _copy_to(self, name: str) -> Send:
        return Send(to=name, message=self.copy())

    def _take_copy(self, sender: str, message: Copy) -> list[Send]:
        self.take(message)
        if self.is_primary:
            return self._maybe_get_ready()
        return [self._to(sender, Reached, position=self.position)]

    # ---- a primary serves workers ------------------------------------------------------------------------------------

    def _ask(self, sender: str, message: Push | Apply | Pull) -> list[Send]:
        """What a worker says replaces what it said before: it goes on only once it is answered."""
        if not isinstance(message, Pull) and self._is_ready and message.step > self.state.step + 1:
            raise ValueError(f"{sender} is at step {message.step}, and the shard has applied {self.state.step}")
        self._asking[sender] = message
        return self._answer_all() if self._is_ready else []

    def _answer_all(self) -> list[Send]:
        """Do what can be done, and answer who can be answered."""
        sends = []
        for name, message in list(self._asking.items()):
            sends += self._advance(name, message)
        for name, message in list(self._asking.items()):
            maybe_answer = self._maybe_answer(name, message)
            if maybe_answer is not None:
                del self._asking[name]
                sends.append(maybe_answer)
        return sends

    def _advance(self, name: str, message: Message) -> list[Send]:
        """What lies at or below what was done is dropped, whatever its token."""
        if isinstance(message, Push) and message.step == self.state.step + 1 and self._maybe_total is None:
            self._parts.update(message.parts)
            if message.maybe_said is not None:
                self._said[name] = message.maybe_said
            return self._maybe_total_up()
        if isinstance(message, Apply) and message.step == self.state.step + 1 and self._are_all_at(self.position):
            assert self._maybe_total is not None, "a decision about what nobody holds"
            self._apply(message.decision)
            return self._tell_backups(Commit, step=message.step, decision=message.decision)
        return []

    def _maybe_total_up(self) -> list[Send]:
        assert self._maybe_assignment is not None
        speakers = self._maybe_assignment.speakers
        parts = sorted(self._parts.items(), key=lambda part: part[0].start)
        is_whole = sum(subtree.size for subtree, _ in parts) == self._num_virtual_workers
        if not is_whole or not self._said.keys() >= set(speakers):
            return []
        total = self.state.fold(parts)
        for name in speakers:
            total = self.state.with_said(total, self._said[name])
        self._maybe_total = total
        self._parts, self._said = {}, {}
        return self._tell_backups(Hold, step=self.state.step + 1, total=self._maybe_total)

    def _tell_backups(self, kind: type[Message], **values: Any) -> list[Send]:
        """Also those that are being filled: a copy that went before comes before."""
        assert self._maybe_assignment is not None
        return [self._to(name, kind, **values) for name in self._maybe_assignment.backups]

    def _are_all_at(self, position: int) -> bool:
        return all(reached >= position for reached in self._positions.values())

    def _maybe_answer(self, name: str, message: Message) -> Send | None:
        done = self.state.step
        if isinstance(message, Push) and message.step == done:
            return self._to(name, Decided, step=done, decision=self._maybe_decision)
        if isinstance(message, Push) and message.step == done + 1:
            if self._maybe_total is None or not self._are_all_at(2 * message.step - 1):
                return None
            return self._to(name, Held, step=message.step, report=self.state.report(self._maybe_total))
        is_to_come = isinstance(message, Apply) and message.step > done
        if is_to_come or not self._are_all_at(2 * done):
            return None
        return self._to(name, Values, step=done, values=self._asked_for(message))

    def _asked_for(self, message: Message) -> Any:
        if not isinstance(message, Pull):
            return self.state.changes()
        return self.state.snapshot() if message.with_optimizer else self.state.values()

    def _hear_reached(self, sender: str, message: Reached) -> list[Send]:
        self._positions[sender] = message.position
        return self._answer_all()

    # ---- a backup follows --------------------------------------------------------------------------------------------

    def _hold(self, sender: str, message: Hold) -> list[Send]:
        if message.step == self.state.step + 1:
            self._maybe_total = message.total
        return [self._to(sender, Reached, position=self.position)]

    def _commit(self, sender: str, message: Commit) -> list[Send]:
        if message.step == self.state.step + 1:
            assert self._maybe_total is not None, "links keep their order"
            self._apply(message.decision)
        return [self._to(sender, Reached, position=self.position)]

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """After an error in the midst of it, this replica has nothing: what it has is of no step."""
        try:
            yield
        except BaseException:
            self._is_filled = False
            raise
        self._is_filled = True

    def _apply(self, decision: Any) -> None:
        with self._changing():
            self.state.apply(self._maybe_total, decision)
        self._maybe_total, self._maybe_decision = None, decision
