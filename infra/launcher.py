"""The launcher: places a run's node agents on an engine. The engine owns nodes; the launcher only asks it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from training.config import LaunchConfig

CANCELLED = "cancelled"
"""Among a job's owners: it was cancelled, but who did so may have died amid that. `reap` does the rest."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Of each node of a job; and of the job, how urgent it is. Zero and empty: as the engine sees fit."""

    num_cpus: int = 0
    memory_bytes: int = 0
    num_gpus: int = 0
    time_limit_seconds: int = 0
    """After which a node is taken away, and asked for again."""
    priority: str = ""
    """One of the names that the site gave its priorities."""

    @staticmethod
    def of(launch: LaunchConfig) -> Needs:
        return Needs(
            num_cpus=launch.cpus_per_node,
            memory_bytes=launch.memory_bytes_per_node,
            num_gpus=launch.gpus_per_node,
            time_limit_seconds=launch.time_limit_seconds,
            priority=launch.priority,
        )


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """One job: an agent on each of `num_nodes` nodes, of which some may come later, or go and come back."""

    key: str
    num_nodes: int
    min_nodes: int = 1
    """With fewer, nothing is done."""
    needs: Needs = field(default_factory=Needs)
    command: tuple[str, ...]
    """`{node}` stands for the node's number."""
    environment: Mapping[str, str]
    store: str = ""
    """Where the run's record lies. A key says what is computed, not where: two stores may have runs of one key."""
    generation: int = 0
    """Of the run. An older one's job makes way for a newer one's."""
    owner: str | None = None
    """Who asked for it. A job whose last owner is cancelled is cancelled with it."""


class JobState(Enum):
    RUNNING = "running"
    ENDED = "ended"
    """Nothing more will come of it."""
    UNKNOWN = "unknown"
    """The engine does not answer. What it was given goes on meanwhile."""


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """What the engine says of a job, node by node. Whether the run succeeded, its record says."""

    state: JobState
    nodes: Mapping[str, str]


class Launcher(Protocol):
    """An engine, as far as this project needs one."""

    def submit(self, spec: JobSpec) -> None:
        """Have the job run. If it is there already, that is the same job; the owner is added to it.

        Raises `UserError` if a run of this key is at work for another store, or if the engine will never have what it
        needs; `FencedError` if it is at work for a newer generation; `InfrastructureError` if the engine is away.
        """

    def find(self, key: str) -> JobStatus | None:
        """The job's status; None if it was cancelled, or never submitted."""

    def jobs(self) -> Mapping[str, Sequence[str]]:
        """Every job's key, and its owners."""

    def logs(self, key: str) -> Sequence[Path]:
        """The log of each of the job's nodes."""

    def reap(self, key: str) -> None:
        """Stop what is left of a job that has ended, which stays known as ended, or that was being cancelled; one that
        runs is left alone."""

    def cancel(self, key: str, *, by: set[str] | None = None) -> bool:
        """Have no process of the job left, and know it no more. No such job: nothing to do.

        `by` some of its owners, it does nothing, and says so (False), if the job has others. Whether these live, an
        engine does not know: if none does, somebody who knows must cancel it once more (flows/reaper/engine_jobs.py).
        """


def cancel_owned_by(launcher: Launcher, owner: str) -> list[str]:
    """Cancel every job that has this owner alone; returns their keys."""
    return [key for key, owners in launcher.jobs().items() if owner in owners and launcher.cancel(key, by={owner})]


def is_others(owners: Iterable[str], by: set[str] | None) -> bool:
    """Whether a job with these owners is not for `by` alone to cancel."""
    return by is not None and not by.issuperset(owners)
