"""One node's part in the membership protocol, without any input or output: events in, actions out.

Nodes tell one another all the time what they are (`Status`); the lowest of those that are ready proposes the next
group, and a compare-and-set on the run record decides. docs/recovery.md states the invariants. The agent runs this code
with sockets, processes and S3 (training.cluster.agent), the simulation without any of them (tests/simulation).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from training.cluster.membership import Proposal, is_over
from training.cluster.next_group import choose, departures, hold_off_seconds, reach
from training.cluster.protocol import (
    Action,
    AskWorkers,
    Event,
    Heard,
    Leave,
    Linked,
    Phase,
    Preempted,
    Propose,
    ReadRecord,
    RecordSeen,
    Renew,
    StartWorkers,
    Status,
    StopWorkers,
    Tell,
    Timing,
    Unlink,
    Unlinked,
    WorkersEnded,
)
from training.runs.record import Departure, Member, Record


@dataclass(kw_only=True)
class Peer:
    """What is known of another node while it is linked."""

    heard_at: float
    first_heard_at: float
    maybe_status: Status | None = None


@dataclass(kw_only=True)
class Node:
    """The state of one node. `handle` is its only way forward."""

    me: Member
    num_nodes: int
    """At most so many in a group."""
    min_nodes: int
    nodes_per_replica: int = 1
    """A group has a multiple of so many."""
    generation: int
    max_restarts: int
    timing: Timing
    since: float
    """When this phase began."""
    phase: Phase = "idle"
    maybe_record: Record | None = None
    maybe_group: Record | None = None
    """Whose workers run here."""
    peers: dict[str, Peer] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    """Incarnations that said that they must go, also after they went."""
    sees_store: bool = True
    is_leaving: bool = False
    has_left: bool = False
    maybe_departure: Departure | None = None
    step: int = 0
    """The last that this node's workers finished."""
    _actions: list[Action] = field(default_factory=list)
    _is_asking: bool = False
    _asked_workers: set[str] = field(default_factory=set)
    _first_token: int = -1
    """The record's when this incarnation came."""
    _handled_at: float = float("-inf")
    _read_at: float = float("-inf")
    _renewed_at: float = 0.0
    _changed_at: float = 0.0
    """When the record was first seen as it is."""
    _situation: tuple[int, bool] = (-1, False)
    """The token that the next group would follow, and whether any of its members would be in it."""
    _situation_since: float = 0.0
    _told_at: float = float("-inf")
    _maybe_told: Status | None = None

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take an event in; returns what is to be done, in this order."""
        self._actions = []
        if not self.has_left:
            self._notice_sleep(now)
            self._take(event, now)
            self._drop_silent_peers(now)
            self._decide(now)
        if not self.has_left:
            self._tell(now)
        return self._actions

    def _notice_sleep(self, now: float) -> None:
        """Who was stopped for long knows nothing of that time: not that a group left no sign of life in it."""
        if now - self._handled_at > self.timing.silence:
            self._changed_at = now
        self._handled_at = now

    # ---- what an event changes -----------------------------------------------------------------------------------

    def _take(self, event: Event, now: float) -> None:
        match event:
            case Linked():
                self.peers[event.incarnation] = Peer(heard_at=now, first_heard_at=now)
            case Unlinked():
                self.peers.pop(event.incarnation, None)
            case Heard():
                if peer := self.peers.get(event.status.member.incarnation):
                    peer.heard_at, peer.maybe_status = now, event.status
                    if event.status.is_leaving:
                        self.preempted.add(event.status.member.incarnation)
                    if event.status.maybe_news is not None:
                        self._take_news(event.status.maybe_news, now)
            case RecordSeen():
                self._take_record(event.maybe_record, now)
            case WorkersEnded():
                self.me = event.me
                self.maybe_group = None
                self.maybe_departure = event.maybe_departure
                self._enter("done" if event.is_finished else "idle", now)
                self.step = event.step
                if event.is_finished:
                    self._read_at = float("-inf")  # for the result
            case Preempted():
                self.is_leaving = True

    def _take_record(self, maybe_record: Record | None, now: float) -> None:
        self._is_asking = False
        self.sees_store = maybe_record is not None
        self._read_at = now
        if maybe_record is not None and self.maybe_record is None:
            self._first_token = maybe_record.token
        if maybe_record is not None and maybe_record != self.maybe_record and not self._is_known_better(maybe_record):
            self.maybe_record = maybe_record
            self._changed_at = now

    def _is_known_better(self, record: Record) -> bool:
        """A read that was under way when news came says less than they did."""
        return self.maybe_record is not None and record.token < self.maybe_record.token

    def _take_news(self, news: Record, now: float) -> None:
        """As if read, but for whether S3 answers. Only for who knows the run's secret already."""
        own = self.maybe_record
        if own is not None and news.generation == own.generation and news.token > own.token:
            self.maybe_record = replace(news, secret=own.secret)
            self._changed_at = now

    def _drop_silent_peers(self, now: float) -> None:
        for incarnation, peer in list(self.peers.items()):
            if now - peer.heard_at > self.timing.silence:
                del self.peers[incarnation]
                self._actions.append(Unlink(incarnation=incarnation))

    def _enter(self, phase: Phase, now: float) -> None:
        self.phase = phase
        self.since = now
        self._asked_workers = set()

    # ---- what follows from the state -----------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        self._maybe_read(now)
        record = self.maybe_record
        if self.phase == "done" and self._read_at >= self.since:
            self._enter("idle", now)  # the record says what follows
        if self.phase == "training":
            self._watch(now)
        elif self.phase == "idle" and record is not None and is_over(record, self.generation):
            self._leave(now, is_preempted=False)
        elif self.phase == "idle" and self.is_leaving:
            self._leave(now, is_preempted=True)
        elif self.phase == "idle" and record is not None:
            if self.me in record.members:
                self._start(record, now)
            else:
                self._maybe_propose(record, now)

    def _leave(self, now: float, *, is_preempted: bool) -> None:
        self.has_left = True
        self._tell(now)  # that it goes, not merely that it is gone
        self._actions.append(Leave(is_preempted=is_preempted))

    def _ask(self, action: ReadRecord | Propose | Renew) -> None:
        self._is_asking = True
        self._actions.append(action)

    def _maybe_read(self, now: float) -> None:
        """Now and then; at once if somebody has seen a newer token."""
        newest = max((status.token for status in self._statuses()), default=0)
        own = self.maybe_record.token if self.maybe_record else -1
        if self.sees_store:
            pause = 0.0 if newest > own else self.timing.poll
        else:
            pause = self.timing.poll if self.phase == "training" else self.timing.retry
        if not self._is_asking and now - self._read_at >= pause:
            self._ask(ReadRecord())

    # ---- a node that trains --------------------------------------------------------------------------------------

    def _watch(self, now: float) -> None:
        group = self.maybe_group
        assert group is not None
        record = self.maybe_record or group
        is_given_up = is_over(record, self.generation) and record.result is None
        is_broken = any(self._is_lost(member, group, now) for member in group.members)
        if record.token != group.token or is_given_up or is_broken:
            self._stop(now)
        elif self.is_leaving:
            self._ask_workers("preempt")
        elif self._leads_group(group):
            if self.sees_store and self._newcomers(group, now):
                self._ask_workers("regroup")
            self._maybe_renew(group, now)

    def _stop(self, now: float) -> None:
        self._enter("stopping", now)
        self._actions.append(StopWorkers())

    def _ask_workers(self, to: Literal["regroup", "preempt"]) -> None:
        if to not in self._asked_workers:
            self._asked_workers.add(to)
            self._actions.append(AskWorkers(to=to))

    def _is_lost(self, member: Member, group: Record, now: float) -> bool:
        """Whether the group cannot go on, for this member's sake."""
        if member.incarnation == self.me.incarnation:
            return False
        peer = self.peers.get(member.incarnation)
        if peer is None:
            return True
        status = peer.maybe_status
        if status is None or status.token < group.token:  # it has not read of the group yet
            return now - self.since > self.timing.start
        return status.token > group.token or status.phase in ("idle", "stopping")

    def _leads_group(self, group: Record) -> bool:
        return group.members[0].incarnation == self.me.incarnation

    def _newcomers(self, group: Record, now: float) -> list[Status]:
        """Those that the group has room for, once they and all its members have reached one another for a moment, and
        a group with them would be larger: it has whole replicas, and all of it reach one another."""
        if len(group.members) >= self.num_nodes:
            return []
        inside = {member.incarnation for member in group.members}
        members = [self._status(), *(s for s in self._statuses() if s.member.incarnation in inside)]
        found = [
            status
            for status in self._ready(group)
            if status.member.incarnation not in inside
            and len(members) == len(inside)
            and all(reach(status, member) for member in members)
            and self._has_waited(status.member, group, now)
        ]
        return found if len(self._choose([*members, *found], group)) > len(members) else []

    def _has_waited(self, newcomer: Member, group: Record, now: float) -> bool:
        """Others may be about to come, too; and one that failed again and again is held off."""
        known_seconds = now - self.peers[newcomer.incarnation].first_heard_at
        return known_seconds >= max(self.timing.batch, hold_off_seconds(newcomer.node, group))

    def _maybe_renew(self, group: Record, now: float) -> None:
        if not self._is_asking and now - max(self._changed_at, self._renewed_at) >= self.timing.renew:
            self._renewed_at = now
            self._ask(Renew(token=group.token))

    # ---- a node that waits for a group ---------------------------------------------------------------------------

    def _start(self, record: Record, now: float) -> None:
        """Whoever is named starts, even if another member is gone: then it stops at once, and has a new port."""
        self.maybe_group = record
        self.maybe_departure = None
        self._enter("training", now)
        self._actions.append(StartWorkers(record=record))

    def _maybe_propose(self, record: Record, now: float) -> None:
        if self._is_asking or not self.sees_store:
            return
        ready = [self._status(), *self._ready(record)]
        chosen = self._choose(ready, record)
        if len(chosen) >= self.fewest_nodes and self._is_time(record, chosen, now):
            members = sorted((status.member for status in chosen), key=lambda member: member.node)
            proposal = Proposal(
                expected_token=record.token,
                generation=self.generation,
                members=tuple(members),
                departures=departures(record, ready, self.preempted),
                max_restarts=self.max_restarts,
            )
            self._ask(Propose(proposal=proposal))

    def _choose(self, ready: Iterable[Status], record: Record) -> list[Status]:
        """Of these, the first of which is this node; nobody, if it is not among them."""
        return choose(ready, record, num_nodes=self.num_nodes, nodes_per_replica=self.nodes_per_replica)

    def _patience(self, chosen: list[Status]) -> float:
        """The lowest proposes. If it does not, for it may see other links, the next one does a while later."""
        return self.timing.gather * sum(status.member.node < self.me.node for status in chosen)

    def _is_time(self, record: Record, chosen: list[Status], now: float) -> bool:
        inside = {member.incarnation for member in record.members}
        remains = any(status.member.incarnation in inside for status in chosen)
        if self._situation != (record.token, remains):
            self._situation, self._situation_since = (record.token, remains), now
        patience = self._patience(chosen)
        waited = now - self._situation_since - patience
        if waited < 0:
            return False
        if not inside:
            return len(chosen) == self.num_nodes or waited > self.timing.join
        if remains:
            ready = {status.member.incarnation for status in self._ready(record)}
            return inside & self.peers.keys() <= ready or waited > self.timing.gather
        return self._may_take_over(record, chosen, now - patience)

    def _may_take_over(self, record: Record, chosen: list[Status], now: float) -> bool:
        """From a group that none of these was in, nor reaches, but for members that say that they wait too: it left no
        sign of life, or all its nodes were placed anew, this one after the group began. (Else two agents of one node,
        each cut off from the other, would take over from one another for ever.)"""
        waiting = {status.member.incarnation for status in self._ready(record)}
        members = {member.incarnation for member in record.members} - waiting
        if any(not members.isdisjoint(status.reaches) for status in chosen):
            return False
        nodes = {status.member.node for status in chosen}
        if record.token == self._first_token and all(member.node in nodes for member in record.members):
            return True
        return now - self._changed_at > self.timing.takeover

    @property
    def fewest_nodes(self) -> int:
        """A group has so many at least."""
        return -(-self.min_nodes // self.nodes_per_replica) * self.nodes_per_replica

    def maybe_want(self, now: float) -> str | None:
        """Why this node has no group, if it is for want of others, and has been so for a while."""
        num_reached = len(self.peers) + 1
        if self.phase != "idle" or num_reached >= self.fewest_nodes or now - self.since < self.timing.gather:
            return None
        return (
            f"a group needs {self.fewest_nodes} nodes (launch.min_nodes, and with parallel.tensor whole replicas), and"
            f" {num_reached} reach one another: it waits for more"
        )

    # ---- what is known of the others -----------------------------------------------------------------------------

    def _statuses(self) -> list[Status]:
        return [peer.maybe_status for peer in self.peers.values() if peer.maybe_status is not None]

    def _ready(self, record: Record) -> list[Status]:
        """Peers that wait for the next group, and know as much as this node does."""
        return [
            status
            for status in self._statuses()
            if status.phase == "idle" and status.token == record.token and status.sees_store and not status.is_leaving
        ]

    def _status(self) -> Status:
        return Status(
            member=self.me,
            token=self.maybe_record.token if self.maybe_record else 0,
            phase=self.phase,
            reaches=tuple(sorted(self.peers)),
            sees_store=self.sees_store,
            is_leaving=self.is_leaving,
            step=self.step,
            maybe_departure=self.maybe_departure,
        )

    def _tell(self, now: float) -> None:
        status = self._status()
        if status != self._maybe_told or now - self._told_at >= self.timing.beat:
            news = self._news(self._maybe_told)
            self._maybe_told, self._told_at = status, now
            self._actions.append(Tell(status=replace(status, maybe_news=news)))

    def _news(self, maybe_told: Status | None) -> Record | None:
        record = self.maybe_record
        is_new = record is not None and maybe_told is not None and maybe_told.token < record.token
        if record is None or not is_new or not record.members or not self._leads_group(record):
            return None
        return replace(record, secret="")  # nosec B106 # it is taken away
