"""What a report tells of a run: only what the store has of it, so that the same run gives the same page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.facts import Code, Data
from tasks.results import Evaluation
from training.runs.events import Event
from training.runs.goodput import Goodput
from training.runs.record import Continued, InitialWeights, Result
from training.runs.system import Sample

State = Literal["finished", "failed", "open"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Nodes that trained together, as far as they told of it. Times in seconds since 1970."""

    token: int
    from_step: int
    why_it_ended: str
    ranks: int | None = None
    nodes: int | None = None
    source: str = ""
    """Where the state came from: "start", "checkpoint" or "memory"."""
    began_at: float | None = None
    ended_at: float | None = None
    """Its last event."""
    last_step: int | None = None
    """None: it finished none."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """A node that left a group by a failure, or was lost."""

    number: int
    """From 1, in the order of the record."""
    node: int
    token: int
    step: int
    """The last that its group finished."""
    class_name: str
    cause: str
    at: float | None
    """When its group was last heard of, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that was proven."""

    step: int
    at: float
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Of one run, finished or not."""

    run_key: str
    generation: int
    name: str
    """Of the model."""
    state: State
    failure: str
    goal_steps: int | None
    steps: tuple[Event, ...]
    """Those that count, one per step."""
    redone: tuple[Event, ...]
    """Those that were done again later."""
    begun_at: float | None
    """The first event, and the last, in seconds since 1970; None if there is none."""
    last_at: float | None
    groups: tuple[Group, ...]
    departures: tuple[Left, ...]
    saved: tuple[Saved, ...]
    damaged: tuple[str, ...]
    """Checkpoints that were found damaged, and why."""
    goodput: Goodput
    samples: Mapping[int, tuple[Sample, ...]]
    """Of each node's machine."""
    evaluation: Evaluation | None
    result: Result | None
    preset: Mapping[str, Any]
    """By dotted key."""
    environment: Mapping[str, str]
    data: Data | None
    code: Code | None
    initial: InitialWeights | None
    continued: Continued | None
    versions: tuple[KeptVersion, ...]
    """Of the registry, that came from it."""
    links: Mapping[str, str]
    unknown: tuple[str, ...]
    """What could not be found out, and why."""

    @property
    def wall_seconds(self) -> float:
        return 0.0 if self.begun_at is None or self.last_at is None else self.last_at - self.begun_at
