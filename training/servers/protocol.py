"""The words of the parameter server: what workers and replicas tell one another in a step.

A step is committed in two phases. In the first, every shard's primary sums the gradients of all virtual workers and
has its backups keep the total. From the reports of all shards the workers, each by itself, come to one decision (the
norm of the gradient needs them all), and in the second every shard applies it. A shard applies nothing before all
shards hold their totals: so whatever dies, a step is either done by totals that survive, or begun again from parameters
that no shard has left. (Two-phase commit: Gray 1978; primary and backups: Alsberg and Day 1976.)

How far a replica has come is one number, its *position*: 2·t after step t is applied, 2·t + 1 once it holds the total
of step t + 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.arithmetic.reduce import Subtree


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who has a shard, by the run record of that token. A process has a new name whenever it starts again."""

    token: int
    primary: str
    backups: tuple[str, ...]
    speakers: tuple[str, ...] = ()
    """Workers without virtual workers, whose word (`Push.maybe_said`) is waited for all the same."""

    @property
    def replicas(self) -> tuple[str, ...]:
        return (self.primary, *self.backups)


@dataclass(frozen=True, kw_only=True)
class Message:
    token: int


# ---- from a worker to a primary --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Push(Message):
    """A worker's part of the gradients of a step: the sums of its virtual workers' subtrees."""

    step: int
    parts: tuple[tuple[Subtree, Any], ...]
    maybe_said: Any = None
    """By a worker without parts: to be added to the total."""


@dataclass(frozen=True, kw_only=True)
class Apply(Message):
    """What all workers decided of a step."""

    step: int
    decision: Any


@dataclass(frozen=True, kw_only=True)
class Pull(Message):
    """Asks for the parameters as they are."""

    with_optimizer: bool = False
    """And for what the optimizer keeps: then the answer's values are a snapshot."""


# ---- from a primary to a worker --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Held(Message):
    """All replicas of the shard hold the total of a step."""

    step: int
    report: Any


@dataclass(frozen=True, kw_only=True)
class Decided(Message):
    """The shard had applied that step already, and so."""

    step: int
    decision: Any


@dataclass(frozen=True, kw_only=True)
class Values(Message):
    """The shard's parameters after a step, which all its replicas have applied."""

    step: int
    values: Any


# ---- among the replicas of a shard -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Standing(Message):
    """How far a backup is as the token begins."""

    position: int


@dataclass(frozen=True, kw_only=True)
class Hold(Message):
    """Keep the total of a step."""

    step: int
    total: Any


@dataclass(frozen=True, kw_only=True)
class Commit(Message):
    """Apply the total that you hold of a step."""

    step: int
    decision: Any


@dataclass(frozen=True, kw_only=True)
class Fetch(Message):
    """Send me all that you have: you are ahead of me, who am to be the primary."""


@dataclass(frozen=True, kw_only=True)
class Copy(Message):
    """All that a replica has."""

    position: int
    snapshot: Any
    maybe_total: Any
    maybe_decision: Any


@dataclass(frozen=True, kw_only=True)
class Left(Message):
    """What a process that ends had of replicas, by their shards: for the process in its place."""

    copies: dict[int, Copy]


@dataclass(frozen=True, kw_only=True)
class Reached(Message):
    """A backup has come so far."""

    position: int


@dataclass(frozen=True, kw_only=True)
class Send:
    """What a state machine asks for."""

    to: str
    message: Message
