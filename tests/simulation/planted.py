"""Bugs planted in the real source, to see that the simulation finds them.

Each is a replacement of a text that must be there exactly once. The changed module is loaded beside the real one, and
the simulation is given what it changed; nothing is written to disk.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from types import ModuleType

from tests.simulation import agent, workers
from tests.simulation.faults import Fault, draw
from tests.simulation.runner import Trace, simulate
from training.cluster import node as node_module
from training.runs.record import Record


@dataclass(frozen=True, kw_only=True)
class Planted:
    name: str
    module: str
    old: str
    new: str
    only: tuple[str, ...] = ()
    """Faults that bring it to light sooner than all kinds; the first of them strikes nodes that wait outside."""
    first_seed: int = 0
    """Where a few hundred seeds begin that bring it to light."""


def node(name: str, old: str, new: str, *only: str, first_seed: int = 0) -> Planted:
    return Planted(name=name, module="cluster.node", old=old, new=new, only=only, first_seed=first_seed)


def next_group(name: str, old: str, new: str, *only: str) -> Planted:
    return Planted(name=name, module="cluster.next_group", old=old, new=new, only=only)


def membership(name: str, old: str, new: str, *only: str, first_seed: int = 0) -> Planted:
    return Planted(name=name, module="cluster.membership", old=old, new=new, only=only, first_seed=first_seed)


def record(name: str, old: str, new: str, *only: str) -> Planted:
    return Planted(name=name, module="runs.record", old=old, new=new, only=only)


ZOMBIES = ("zombie", "freeze agent", "host lost", "partition", "replaced while cut off", "freeze worker")
PLANTED = (
    record("the token is not checked", "if self.token != token:", "if False:", *ZOMBIES),
    record("an older token may commit", "if self.token != token:", "if self.token < token:", *ZOMBIES),
    record(
        "a checkpoint is named under any token",
        "    record.require_token(checkpoint.token)\n    others",
        "    others",
        *ZOMBIES,
    ),
    record("retention keeps the oldest", "record.checkpoints[-max(1, keep) :]", "record.checkpoints[: max(1, keep)]"),
    record("a checkpoint replaces all others", "if c.step != checkpoint.step)", "if False)"),
    record("a result strikes the checkpoints", "result=result, failure=None", "result=result, checkpoints=()"),
    membership("the proposal's token is not checked", "record.token != proposal.expected_token or ", ""),
    membership("a group is begun after the result", " or is_over(record, proposal.generation)", ""),
    membership("a group keeps its predecessor's token", "token=record.token + 1, members=proposal", "members=proposal"),
    membership(
        "a token is skipped", "token=record.token + 1, members=proposal", "token=record.token + 2, members=proposal"
    ),
    membership("errors for good are tried again", "if latest.class_name in FOR_GOOD:", "if False:", "user error"),
    membership("one exception is taken for two", "len({d.token for d in same}) >= most", "len(same) > 0", "exception"),
    membership("any loss is a failure for good", "if restarts > max_restarts:", "if restarts > 0:"),
    membership(
        "signs of life are not left",
        "signs_of_life=record.signs_of_life + 1",
        "signs_of_life=0",
        "cut one way",
        "newcomer",
        "cut link",
        first_seed=600,
    ),
    node("a store is used again", "                self.me = event.me\n", ""),
    node("a vote is counted twice", "*self._ready(record)]\n", "*self._ready(record), *self._ready(record)]\n"),
    node(
        "whoever was a member starts",
        "if self.me in record.members:",
        "if self.me.incarnation in [m.incarnation for m in record.members]:",
    ),
    node("fewer than the minimum go on", "len(chosen) >= self.fewest_nodes and ", ""),
    node("nodes that train are proposed", 'if status.phase == "idle" and status.token', "if status.token"),
    node("the first group does not wait", "or waited > self.timing.join", "or waited >= 0"),
    node("a broken group's members are not waited for", "or waited > self.timing.gather", "or waited >= 0"),
    node("groups are taken over at once", "now - self._changed_at > self.timing.takeover", "True"),
    node(
        "a group that is reached is taken over",
        "if any(not members.isdisjoint(status.reaches) for status in chosen):",
        "if False:",
    ),
    node(
        "time asleep counts",
        "            self._changed_at = now\n        self._handled_at",
        "            pass\n        self._handled_at",
        "cut one way",
        "clock jump",
        "partition",
        "freeze agent",
    ),
    node(
        "no sign of life is left",
        "now - max(self._changed_at, self._renewed_at) >= self.timing.renew",
        "False",
        "cut one way",
        "newcomer",
        "cut link",
        first_seed=600,
    ),
    node(
        "replaced and replacement take over at once",
        "record.token == self._first_token and ",
        "",
        "replaced while cut off",
    ),
    node("silence is not noticed", "if now - peer.heard_at > self.timing.silence:", "if False:"),
    node(
        "a lost member is not missed",
        "        if peer is None:\n            return True",
        "        if peer is None:\n            return False",
        first_seed=400,
    ),
    node("stopping is only thought of", "        self._actions.append(StopWorkers())\n", "", first_seed=400),
    node(
        "a newer token does not stop the workers",
        "if record.token != group.token or is_given_up or is_broken:",
        "if is_broken:",
        "replaced while cut off",
        "partition",
        first_seed=400,
    ),
    node(
        "any change of the record stops the workers",
        "if record.token != group.token or is_given_up",
        "if record != group or is_given_up",
        "S3 slow",
    ),
    node(
        "S3 away stops the workers",
        "if record.token != group.token or is_given_up",
        "if not self.sees_store or is_given_up",
        "S3 away",
    ),
    node(
        "S3 away does not keep a group from regrouping",
        "if self.sees_store and self._newcomers",
        "if self._newcomers",
        "S3 away for one",
        "newcomer",
    ),
    node(
        "a replacement is a newcomer",
        "> len(members) else []",
        "> 0 else []",
        "replaced while cut off",
        "host away",
    ),
    next_group(
        "who goes is lost",
        'if member.incarnation in preempted else "NodeLost"',
        'if False else "NodeLost"',
        "preempt",
    ),
    node("who goes does not say so", "        self._tell(now)  # that", "        # that", "preempt"),
    node("preemption is not heard", "                self.is_leaving = True\n", "                pass\n", "preempt"),
    node(
        "who said why is not heard",
        "departures=departures(record, ready, self.preempted)",
        "departures=()",
        "user error",
    ),
    next_group(
        "the odd one out is proposed",
        "if s is not own and num_links(s) < len(chosen)]",
        "if False]",
        "cut for ever",
    ),
    node("nobody is asked for a newcomer's sake", 'self._ask_workers("regroup")', "pass", "newcomer"),
    node(
        "agents leave when idle",
        'elif self.phase == "idle" and record is not None and is_over(record, self.generation)',
        'elif self.phase == "idle" and record is not None and record.token',
    ),
    node(
        "the lowest proposes, or nobody",
        "return self.timing.gather * sum(status.member.node < self.me.node for status in chosen)",
        "return 1e9 * any(s.member.node < self.me.node for s in self._ready(self.maybe_record))",
        "cut for ever",
        first_seed=2600,
    ),
    node(
        "news are told of a group that nobody began",
        '        return replace(record, secret="")',
        '        return replace(record, secret="", token=record.token + 1)',
    ),
    node("a member that never comes is waited for", "return now - self.since > self.timing.start", "return False"),
    next_group(
        "a part of a replica is proposed",
        "chosen = chosen[: size - size % nodes_per_replica]",
        "chosen = chosen[:size]",
    ),
    node(
        "a group ends for a newcomer that makes no replica",
        "> len(members) else []",
        ">= len(members) else []",
        "newcomer",
    ),
    node(
        "newcomers are counted one by one",
        "self._choose([*members, *found], group)",
        "self._choose([*members, *found[:1]], group)",
        "newcomer",
        first_seed=900,
    ),
    node(
        "a replica more than enough is waited for",
        "return -(-self.min_nodes // self.nodes_per_replica) * self.nodes_per_replica",
        "return (self.min_nodes // self.nodes_per_replica + 1) * self.nodes_per_replica",
        "cut for ever",
    ),
)


@contextmanager
def planted(bug: Planted) -> Iterator[None]:
    """The simulation, with this bug. Raises `ValueError` if the text to replace is not there exactly once."""
    real = importlib.import_module(f"training.{bug.module}")
    source = inspect.getsource(real)
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: the text is {source.count(bug.old)} times in {real.__name__}: {bug.old!r}")
    changed = ModuleType(f"{real.__name__} with a bug")
    sys.modules[changed.__name__] = changed  # where dataclasses look up their module
    exec(compile(source.replace(bug.old, bug.new), changed.__name__, "exec"), changed.__dict__)
    undo = []
    for owner in (agent, workers, node_module, Record):
        for name, value in list(vars(owner).items()):
            replacement = changed if value is real else _counterpart(value, real, changed)
            if replacement is not None:
                setattr(owner, name, replacement)
                undo.append((owner, name, value))
    try:
        yield
    finally:
        for owner, name, value in undo:
            setattr(owner, name, value)
        del sys.modules[changed.__name__]


def _counterpart(value: object, real: ModuleType, changed: ModuleType) -> object:
    """Functions, the node and the record's methods; all other classes stay, for their instances are compared."""
    if getattr(value, "__module__", None) != real.__name__:
        return None
    if inspect.isfunction(value):
        owner = changed
        for part in value.__qualname__.split(".")[:-1]:
            owner = getattr(owner, part)
        return getattr(owner, value.__name__)
    return changed.Node if getattr(value, "__name__", "") == "Node" else None


def find(bug: Planted, *, seeds: range) -> Trace | None:
    """The first schedule that breaks an invariant; None if the bug survives them all. A crash counts."""
    with planted(bug):
        for seed in seeds:
            trace = simulate(seed, maybe_faults=_faults_for(bug, seed))
            if trace.maybe_violation is not None:
                return trace
    return None


def _faults_for(bug: Planted, seed: int) -> list[Fault] | None:
    """Some that bring it to light; None for those that the seed draws by itself."""
    drawn = draw(Random(~seed), bug.only)
    if not bug.only or seed % 4 == 3:
        return None
    if seed % 4 == 2:  # long ones, after the first kind
        return [replace(f, seconds=30.0, at=f.at + 5.0 * (f.name != bug.only[0])) for f in drawn]
    if seed % 4 == 1:
        return drawn
    return [replace(f, maybe_aim=("idle", "outsider")) if f.name == bug.only[0] else f for f in drawn]
