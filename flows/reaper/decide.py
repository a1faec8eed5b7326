"""What was seen → what is to be done: pure functions, so that each case of a death is one line of a test."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from uuid import UUID

from infra.launcher import JobState

GONE_SECONDS = 10.0
"""A flow run's process was seen on this machine and is gone: its worker, if that lives, tells of it sooner."""
SILENT_SECONDS = 90.0
"""Three heartbeats of a flow run whose process was never seen on this machine."""
CRASHED_SECONDS = 20.0
"""A worker reports a crash twice, seconds apart: the second report must not hit the run that was resumed."""
CANCEL_SECONDS = 5.0
"""A flow run's own process, and its hook, end its jobs sooner."""
END_SECONDS = 12.0
QUIET_SECONDS = 60.0
"""Twelve signs of life of a follower, six of a group of ranks."""
MAX_CRASHES_IN_AN_HOUR = 5


class FlowVerdict(Enum):
    LEAVE = "leave"
    RESUME = "resume"
    """Crashed, if it does not say so yet; then scheduled again: finished stages are found, a job is re-attached."""
    RESTORE = "restore"
    """Running: it says Crashed, and its process lives."""
    CANCEL_JOBS = "cancel its jobs"
    END = "end"
    """Kill its process, if there is one, cancel its jobs, and call it cancelled."""


@dataclass(frozen=True, kw_only=True)
class FlowSight:
    """One flow run, as it was seen."""

    state: str
    """Prefect's state type."""
    seconds_in_state: float
    is_here: bool
    """Its process runs on this machine."""
    was_here: bool
    silent_seconds: float
    """Since its state changed, its process was seen, or a heartbeat came."""
    num_crashes: int = 0
    """Within the last hour."""


def judge_flow(sight: FlowSight) -> FlowVerdict:
    if sight.state == "CANCELLING":
        return _judge_cancelling(sight)
    if sight.state == "CRASHED" and sight.seconds_in_state > CRASHED_SECONDS:
        if sight.is_here:
            return FlowVerdict.RESTORE
        return FlowVerdict.RESUME if sight.num_crashes <= MAX_CRASHES_IN_AN_HOUR else FlowVerdict.LEAVE
    if sight.state in ("RUNNING", "PENDING") and not sight.is_here:
        is_lost = sight.silent_seconds > (GONE_SECONDS if sight.was_here else SILENT_SECONDS)
        return FlowVerdict.RESUME if is_lost else FlowVerdict.LEAVE
    return FlowVerdict.LEAVE


def _judge_cancelling(sight: FlowSight) -> FlowVerdict:
    if sight.seconds_in_state > END_SECONDS:
        return FlowVerdict.END
    if sight.seconds_in_state > CANCEL_SECONDS:
        return FlowVerdict.END if sight.was_here and not sight.is_here else FlowVerdict.CANCEL_JOBS
    return FlowVerdict.LEAVE


def is_job_unwanted(owner_states: Collection[str | None]) -> bool:
    """Whether a job is to be cancelled, by the state of each flow run that asked for it (None: Prefect knows none).

    A job without owners is a person's (`unbroken train`); one of a failed flow run trains on for the next one.
    """
    ended = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED", None}
    return "CANCELLED" in owner_states and all(state in ended for state in owner_states)


class TrackedVerdict(Enum):
    """What an MLflow run that says RUNNING is to become."""

    LEAVE = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    DELETE = "deleted"
    """Its maker died before the run record could name it."""


@dataclass(frozen=True, kw_only=True)
class TrackedSight:
    """An MLflow run that says RUNNING, and what there is of its run."""

    quiet_seconds: float
    """Since its follower or its ranks gave a sign of life."""
    is_removed: bool = False
    """The run has no record any more."""
    is_older: bool = False
    """The run was begun anew since."""
    is_named: bool = True
    """The run record names this MLflow run."""
    has_result: bool = False
    has_failed: bool = False
    job: JobState | None = None


def judge_tracked(sight: TrackedSight) -> TrackedVerdict:
    if sight.quiet_seconds <= QUIET_SECONDS:
        return TrackedVerdict.LEAVE
    if sight.is_removed or sight.is_older:
        return TrackedVerdict.KILLED
    if not sight.is_named:
        return TrackedVerdict.DELETE
    if sight.has_result:
        return TrackedVerdict.FINISHED
    if sight.has_failed:
        return TrackedVerdict.FAILED
    if sight.job in (JobState.RUNNING, JobState.UNKNOWN):
        return TrackedVerdict.LEAVE
    return TrackedVerdict.FAILED if sight.job is JobState.ENDED else TrackedVerdict.KILLED


def is_flow_run(owner: str) -> bool:
    """Or is it another of a job's owners, such as a command line?"""
    try:
        UUID(owner)
    except ValueError:
        return False
    return True
