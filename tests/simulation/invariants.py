"""What must hold in every schedule, checked at every event (docs/recovery.md has the same list, in words)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, permutations
from typing import TYPE_CHECKING

from training.cluster.membership import is_over
from training.runs.record import Member, Record

if TYPE_CHECKING:
    from tests.simulation.agent import SimulatedAgent
    from tests.simulation.workers import Group
    from tests.simulation.world import World

ANSWER = 2.0
"""Seconds after which whoever asked a disturbed S3 has its answer, or knows that there is none."""
PATIENCE = 30.0
"""Seconds within which nodes that wait, and are left in peace, form a group: also if they have to take over."""


class Violation(Exception):
    """An invariant does not hold; `rule` names it."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(rule, message)
        self.rule = rule
        self.message = message

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


def world_has_only(world: World, name: str) -> bool:
    """Whether every fault so far was one of these."""
    return all(fault.name == name for fault in world.fired)


def _are_linked(agents: Iterable[SimulatedAgent]) -> bool:
    return all(other.name in one.links for one, other in permutations(agents, 2))


class Invariants:
    """Watches one world. Knows of the nodes only what they do, never what they think."""

    __slots__ = (
        "_began_at",
        "_disturbed_at",
        "_lines",
        "_members",
        "_newest_step_token",
        "_num_fired",
        "_num_takeovers",
        "_ports",
        "_world",
        "completed",
    )

    def __init__(self, world: World) -> None:
        self._world = world
        self._members: dict[int, tuple[Member, ...]] = {}
        self._ports: dict[int, int] = {}
        """The token whose workers look for their store on this port."""
        self._lines: dict[int, int] = {0: 0}
        """For each token, the first of its line, which goes on while a group shares a member with the one before."""
        self._began_at: dict[int, float] = {}
        """When the record named each token's group."""
        self._newest_step_token = 0
        self._num_takeovers = 0
        self._num_fired = 0
        self._disturbed_at = 0.0
        """When S3 was seen disturbed last, or a fault struck."""
        self.completed: dict[int, int] = {}
        """For each token, the last step that all its members completed."""

    # ---- the record ----------------------------------------------------------------------------------------------

    def on_record(self, before: Record, after: Record, maybe_token: int | None) -> None:
        """`maybe_token` is that of the group whose worker changed the record."""
        self._require(maybe_token is None or maybe_token == before.token, "fenced", f"token {maybe_token} wrote")
        self._require(before.token <= after.token <= before.token + 1, "token grows by one", f"{after.token}")
        if after.token == before.token:
            self._require(before.members == after.members, "one group per token", f"token {after.token}")
        elif after.members:
            self._on_group(before, after)
        else:
            self._lines[after.token] = after.token
        for reference in set(after.checkpoints) - set(before.checkpoints):
            is_own = maybe_token == reference.token == after.token == before.token
            self._require(is_own, "named under its own token", f"{reference}")
        for departure in set(after.departures) - set(before.departures):
            was_told = set(after.members) != set(before.members) and {m.incarnation for m in after.members} <= {
                m.incarnation for m in before.members
            }
            is_wrong = was_told and departure.class_name == "NodeLost" and world_has_only(self._world, "preempt")
            self._require(not is_wrong, "who was preempted is not lost", f"{departure}")
        if after.generation == before.generation:
            self._nothing_lost(before, after)

    def _on_group(self, before: Record, after: Record) -> None:
        token = after.token
        self._require(token not in self._members, "one group per token", f"token {token}")
        self._require(len({m.node for m in after.members}) == len(after.members), "a node once", f"{after.members}")
        size, world = len(after.members), self._world
        self._require(world.min_nodes <= size <= world.num_nodes, "group size", f"{size}")
        self._require(size % world.nodes_per_replica == 0, "whole replicas", f"{size}")
        self._members[token] = after.members
        self._began_at[token] = self._world.agenda.now
        names = {member.incarnation for member in after.members}
        shares = any(member.incarnation in names for member in before.members)
        self._lines[token] = self._lines[before.token] if shares else token
        if before.members and not shares:
            self._on_takeover(before, after)
        maybe_group = self._world.groups.get(before.token)
        if maybe_group is not None and maybe_group.asked == "regroup" and self._is_calm_since(maybe_group):
            is_new = names != {member.incarnation for member in before.members}
            self._require(is_new, "nobody regroups in vain", f"token {token}")
        if not self._world.fired:
            self._on_calm_group(before, after)

    def _on_calm_group(self, before: Record, after: Record) -> None:
        """Before any fault, nobody is left out: neither those who come within the time to join, nor members."""
        world = self._world
        names = {member.incarnation for member in after.members}
        left_out = [member.incarnation for member in before.members if member.incarnation not in names]
        self._require(not left_out, "no member left out without cause", f"{left_out}")
        if not before.members and len(after.members) < world.num_nodes:
            waited = world.agenda.now - min(world.by_name(name).placed_at for name in names)
            self._require(waited > 2.5, "the first group waits for all", f"{waited:.1f} s for {sorted(names)}")

    def _on_takeover(self, before: Record, after: Record) -> None:
        """Only from a group that cannot be reached; and in the world without S3 faults, only if its lead is gone."""
        world = self._world
        self._num_takeovers += 1
        most = len(world.agents) + world.agenda.now / 10.0
        self._require(self._num_takeovers <= most, "no takeovers to and fro", f"{self._num_takeovers} by now")
        newcomers = {member.incarnation for member in after.members}
        for member in before.members:
            agent = world.by_name(member.incarnation)
            is_ready = agent.is_alive and not agent.is_frozen and agent.node.phase == "idle" and not agent.is_preempted
            is_linked = any(agent.name in world.by_name(name).links for name in newcomers & agent.links.keys())
            since = max(agent.idle_since, agent.linked_since)
            is_known = is_ready and is_linked and world.agenda.now - since > 3.0 and agent.node.sees_store
            if member.node in {other.node for other in after.members}:  # another agent of its node can reach more
                is_known &= newcomers - {agent.name} <= agent.links.keys()
            self._require(not is_known, "no survivor left out", f"{agent.name} could have been a member")
        maybe_group = world.groups.get(before.token)
        placed_anew = {member.node for member in before.members} <= {member.node for member in after.members}
        if maybe_group is not None and maybe_group.maybe_first is not None and not placed_anew:
            lead = maybe_group.maybe_first.agent
            is_well = not world.had_store_faults and not lead.was_disturbed and maybe_group.num_done > 0
            self._require(not is_well, "a living group is not replaced", f"token {before.token}")

    def _nothing_lost(self, before: Record, after: Record) -> None:
        gone = {c.step for c in before.checkpoints} - {c.step for c in after.checkpoints}
        newest = max((c.step for c in after.checkpoints), default=-1)
        self._require(
            not gone or (max(gone) < newest and len(after.checkpoints) >= 2), "no checkpoint is lost", f"{gone}"
        )
        self._require(before.result in (None, after.result), "the result stays", f"{after.result}")
        if after.failure != before.failure and after.failure is not None:
            kinds = self._world.reported
            is_told = after.failure.kind in kinds
            is_told |= after.failure.kind == "DeterministicError" and kinds.count("Exception") > 1
            self._require(is_told, "no failure without a cause", f"{after.failure}")

    # ---- agents --------------------------------------------------------------------------------------------------

    def on_tick(self, agent: SimulatedAgent) -> None:
        """Where nobody trains, and nothing went wrong for long, it is for want of nodes that reach one another."""
        world, now = self._world, self._world.agenda.now
        if not world.store.is_well or len(world.fired) != self._num_fired:
            self._num_fired, self._disturbed_at = len(world.fired), now
        is_patient = agent.node.phase == "idle" and min(now - self._disturbed_at, now - agent.idle_since) > PATIENCE
        if not is_patient or is_over(world.store.record, 0):
            return
        living = [one for one in world.agents if one.is_alive]
        if any(one.is_frozen or one.is_preempted or one.node.phase != "idle" for one in living):
            return
        for group in combinations(living, world.fewest_nodes):
            if len({one.number for one in group}) == len(group) and _are_linked(group):
                since = max(max(one.idle_since, one.linked_since, one.frozen_at) for one in group)
                names = [one.name for one in group]
                self._require(now - since < PATIENCE, "nobody waits in vain", f"{names} for {now - since:.1f} s")

    def on_start(self, agent: SimulatedAgent, record: Record) -> None:
        members = self._members.get(record.token)
        self._require(members == record.members, "as the record says", f"{agent.name} starts {record.members}")
        mine = [member for member in record.members if member.incarnation == agent.name]
        self._require(mine == [agent.node.me], "workers run at members", f"{agent.name} at token {record.token}")
        self._require(record.token not in agent.started_tokens, "a token is started once", f"{agent.name}")
        self._on_store(record, is_host=record.members[0] == agent.node.me)
        worker = agent.maybe_worker
        self._require(worker is None, "one group at a time", f"{agent.name} has workers")

    def _on_store(self, record: Record, *, is_host: bool) -> None:
        """Nobody looks for another group's store there, if there was one.

        (An agent that never learnt that it was named offers the same socket again: each token has a corner of its own.)
        """
        port = record.members[0].port
        maybe_older = self._ports.get(port, record.token)
        if maybe_older != record.token:
            group = self._world.groups[maybe_older]
            strays = [worker.agent.name for worker in group.workers.values() if worker.is_alive]
            self._require(not strays, "a fresh store", f"workers of tokens {maybe_older} and {record.token}: {strays}")
        if is_host:
            self._ports[port] = record.token

    def on_stop(self, agent: SimulatedAgent) -> None:
        """S3 away alone never stops a healthy group."""
        world = self._world
        worker = agent.maybe_worker
        if worker is not None and worker.group.num_done and world.fired and not world.had_other_faults:
            is_well = not worker.group.is_broken and not worker.group.is_finishing
            self._require(not is_well, "S3 away stops nobody", f"{agent.name} stops token {worker.group.token}")

    def on_asked(self, agent: SimulatedAgent, to: str) -> None:
        store = self._world.store
        was_told = not agent.node.sees_store
        self._require(
            to == "preempt" or not (was_told and store.is_away_for(agent.host)), "no regroup without S3", agent.name
        )
        self._require(to == "regroup" or agent.is_preempted, "preempted only if told so", agent.name)

    def on_preemption_due(self, agent: SimulatedAgent) -> None:
        if world_has_only(self._world, "preempt"):
            self._require(not agent.is_alive, "who is preempted leaves", agent.name)

    def on_leave(self, agent: SimulatedAgent, *, is_preempted: bool) -> None:
        is_right = agent.is_preempted if is_preempted else is_over(self._world.store.record, 0)
        self._require(is_right, "agents leave only when all is done", agent.name)
        self._require(agent.maybe_worker is None, "nobody leaves workers behind", agent.name)

    # ---- groups --------------------------------------------------------------------------------------------------

    def on_resume(self, group: Group, record: Record) -> None:
        """A step that all members of a group completed is not done again, if one of them is here with its memory."""
        newest = max((c.step for c in record.checkpoints), default=0)
        self._require(group.resumed_at >= newest, "no step before a checkpoint", f"{group.resumed_at}")
        if self._world.fired and world_has_only(self._world, "preempt") and not self._world.had_idle_preempted:
            furthest = max(self.completed.values(), default=0)
            self._require(group.resumed_at >= furthest, "preemption loses no step", f"{group.resumed_at} of {furthest}")
        for token, step in self.completed.items():
            if token < group.token and self._lines[token] == self._lines[group.token]:
                is_kept = any(name in self._world.kept_memory(token) for name in group.members)
                self._require(
                    not is_kept or group.resumed_at >= step, "no step is redone", f"{group.resumed_at} of {step}"
                )

    def _is_calm_since(self, group: Group) -> bool:
        world = self._world
        return len(world.fired) == group.began_after and world.unwell_at + ANSWER < self._began_at[group.record.token]

    def _takes_newcomers_in(self, group: Group) -> None:
        """Where there is room for those who have waited for long, and they are whole replicas."""
        world = self._world
        nodes = {member.node for member in group.record.members}
        if len(nodes) == world.num_nodes or not all(fault.name == "newcomer" for fault in world.fired):
            return
        waiting = [
            agent.name
            for agent in world.agents
            if agent.is_alive
            and agent.number not in nodes
            and agent.node.phase == "idle"
            and world.agenda.now - max(agent.placed_at, agent.idle_since, self._began_at[group.token]) > 10.0
        ]
        self._require(len(waiting) < world.nodes_per_replica, "newcomers are taken in", f"{waiting} wait")

    def on_step(self, group: Group) -> None:
        token = group.token
        self.completed[token] = group.step
        self._takes_newcomers_in(group)
        if token >= self._newest_step_token:
            self._newest_step_token = token
            return
        since = self._world.agenda.now - self._began_at[token + 1] if token + 1 in self._began_at else 0.0
        now = self._world.agenda.now
        awake = [worker for worker in group.workers.values() if now - worker.agent.frozen_at > 12.0]
        is_told = since > 12.0 and awake and not self._world.had_store_faults
        self._require(not is_told, "the losing side stops when told", f"token {token} goes on for {since:.1f} s")
        names = set(group.members)
        for later in self._world.groups.values():
            if later.token <= token or not later.num_done:
                continue
            shares = self._lines.get(later.token) == self._lines.get(token) or not names.isdisjoint(later.members)
            self._require(not shares, "never both go on", f"tokens {token} and {later.token}")

    def on_end(self, *, can_finish: bool) -> None:
        """Time is up, long after the last fault."""
        world = self._world
        if can_finish:
            self._require(is_over(world.store.record, 0), "the run goes on", "it did not finish")
            left = [agent.name for agent in world.agents if agent.is_alive]
            self._require(not left, "all leave", f"{left} did not")
            if "UserError" in world.reported and world_has_only(world, "user error"):
                record = world.store.record
                self._require(record.failure is not None, "an error for good ends the run", "")

    def _require(self, holds: bool, rule: str, message: str) -> None:
        if not holds:
            raise Violation(rule, message)
