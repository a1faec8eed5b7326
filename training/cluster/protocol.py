"""The words of the membership protocol: what nodes tell one another, what happens to them, and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.cluster.membership import Proposal
from training.runs.record import Departure, Member, Record

Phase = Literal["idle", "training", "stopping", "done"]
"""idle: no workers, ready for a group; done: the workers say that the run is finished."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a node waits for what, in seconds."""

    beat: float = 0.1
    """Between two statuses, if nothing changes."""
    silence: float = 3.0
    """After which a peer that says nothing counts as lost."""
    start: float = 10.0
    """Within which a member of a new group must have begun to train."""
    gather: float = 2.0
    """How long a broken group's living members are waited for before the next one is proposed without them."""
    join: float = 10.0
    """How long the first group waits for nodes beyond the minimum."""
    batch: float = 0.2
    """How long newcomers are collected before a group that trains is asked to take them in."""
    poll: float = 2.0
    """Between two looks at the record."""
    retry: float = 0.5
    """Between two looks for a store that is away."""
    renew: float = 10.0
    """Between two signs of life that a group leaves in the record."""
    takeover: float = 40.0
    """After which a group that leaves none may be replaced by nodes that it does not hold and cannot be reached by."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a node tells all others that it is linked with: the only message of the protocol."""

    member: Member
    """With the port of the store that it would serve for the next group."""
    token: int
    """The newest it has seen in the record."""
    phase: Phase
    reaches: tuple[str, ...]
    """Incarnations it is linked with."""
    sees_store: bool
    is_leaving: bool
    step: int
    """The last that its workers finished when they ended."""
    maybe_departure: Departure | None
    """Why its workers failed last."""
    maybe_news: Record | None = None
    """The record as it names a group whose first member this node is, said once and without its secret: the others need
    not read it."""


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time went by."""


@dataclass(frozen=True, kw_only=True)
class Linked:
    incarnation: str


@dataclass(frozen=True, kw_only=True)
class Unlinked:
    incarnation: str


@dataclass(frozen=True, kw_only=True)
class Heard:
    status: Status


@dataclass(frozen=True, kw_only=True)
class RecordSeen:
    """The answer to `ReadRecord`, `Propose` and `Renew`: the newest record; None if the store is away."""

    maybe_record: Record | None


@dataclass(frozen=True, kw_only=True)
class WorkersEnded:
    """All of this node's workers are gone."""

    me: Member
    """With a new port."""
    step: int = 0
    is_finished: bool = False
    maybe_departure: Departure | None = None


@dataclass(frozen=True, kw_only=True)
class Preempted:
    """This node must go soon."""


Event = Tick | Linked | Unlinked | Heard | RecordSeen | WorkersEnded | Preempted

# ---- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Tell:
    """Send to every linked peer."""

    status: Status


@dataclass(frozen=True, kw_only=True)
class Unlink:
    """Close the link to a silent peer; it may be linked again."""

    incarnation: str


@dataclass(frozen=True, kw_only=True)
class ReadRecord:
    pass


@dataclass(frozen=True, kw_only=True)
class Propose:
    """Replace the record, unless it has changed hands (training.cluster.membership.begin_group)."""

    proposal: Proposal


@dataclass(frozen=True, kw_only=True)
class Renew:
    """Leave a sign of life in the record (training.cluster.membership.renew)."""

    token: int


@dataclass(frozen=True, kw_only=True)
class StartWorkers:
    record: Record


@dataclass(frozen=True, kw_only=True)
class StopWorkers:
    """At once; what they hold in memory is kept."""


@dataclass(frozen=True, kw_only=True)
class AskWorkers:
    """Something that all ranks do together, after the step that they are in."""

    to: Literal["regroup", "preempt"]


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Nothing is left to do here."""

    is_preempted: bool


Action = Tell | Unlink | ReadRecord | Propose | Renew | StartWorkers | StopWorkers | AskWorkers | Leave
