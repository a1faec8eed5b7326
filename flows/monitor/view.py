"""What a person is shown of a run: built here from what was read, shown by the pages and on a terminal.

Pure: the same reading gives the same view. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows.monitor.seen import Point, Seen
from infra.launcher import JobStatus
from tasks.attempts import attempts_table
from tasks.nodes import describe
from training.config import Preset
from training.runs.events import json_number
from training.runs.failures import num_failures
from training.runs.goodput import Use
from training.runs.record import Record

State = Literal["waiting", "starting", "training", "recovering", "stalled", "finished", "failed", "stopped"]
OVER: tuple[State, ...] = ("finished", "failed", "stopped")
MAX_ATTEMPTS = 20
"""Those that are shown, the newest."""
AT_WORK = ("RUNNING", "STARTING")
"""How an engine's words for a node that works begin."""


@dataclass(frozen=True, kw_only=True)
class RankView:
    """One rank, as its agent tells. Seconds are of a mean step of its group."""

    rank: int
    step: int
    loss: float | None = None
    heard_at: float
    """Its last sign of life."""
    busy_seconds: float | None = None
    """Outside of collectives, if all ranks had as many virtual workers: a straggler has more than the others."""
    collective_seconds: float | None = None
    data_wait_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node: what its agent tells, or that it does not answer."""

    node: int
    address: str
    is_answering: bool
    is_training: bool = False
    sees_store: bool = True
    num_peers: int = 0
    memory_used_share: float | None = None
    disk_free_bytes: float | None = None
    """Of the fuller one of its disks."""
    gpu_busy_share: float | None = None
    """The mean of its GPUs."""
    ranks: tuple[RankView, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """One group that trained."""

    number: int
    """From 1."""
    token: int
    began: str
    num_ranks: int | None
    from_step: int
    source: str
    why_it_ended: str


@dataclass(frozen=True, kw_only=True)
class AlertView:
    """One that fires now."""

    name: str
    severity: str
    run: str
    """The short key of the run that it is about; or nothing."""
    summary: str
    cause: str
    link: str
    since: str


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run at one moment."""

    key: str
    model: str
    at: float
    state: State
    why: str
    """What there is to say of the state, in a few words."""
    step: int
    goal_steps: int
    step_at: float | None
    steps_per_second: float | None
    samples_per_second: float | None
    loss: float | None
    expected_end_at: float | None
    deadline_at: float | None
    began_at: float | None
    ended_at: float | None
    token: int
    num_ranks: int
    group_nodes: int
    wanted_nodes: int
    engine: str
    """What the engine says of its nodes."""
    checkpoint_step: int
    checkpoint_at: float | None
    checkpoint_every_steps: int
    num_attempts: int
    num_departures: int
    num_failures: int
    last_departure: Mapping[str, str]
    attempts: tuple[AttemptView, ...]
    seconds: Mapping[Use, float]
    """Where its time went."""
    notes: tuple[str, ...]
    """A slow node, shares that differ."""
    curve: tuple[Point, ...]
    links: Mapping[str, str]
    nodes: tuple[NodeView, ...] = ()
    """Only where somebody asked for the run itself."""
    num_unasked_nodes: int = 0
    """Beyond those."""
    alerts: tuple[AlertView, ...] | None = None
    """None: there is no Alertmanager to ask."""

    @property
    def short_key(self) -> str:
        return self.key[:12]

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def goodput(self) -> float | None:
        """The productive share of its time."""
        wall = sum(self.seconds.values())
        return self.seconds["productive"] / wall if wall else None


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A flow run that nobody executes yet."""

    name: str
    queue: str
    state: str
    """Prefect's word: Late, AwaitingRetry, Scheduled."""
    seconds: float
    """Since it should have been running."""
    link: str


@dataclass(frozen=True, kw_only=True)
class Servers:
    """One look at all of them."""

    at: float
    up: Mapping[str, bool] = field(default_factory=dict)
    flow_runs: Mapping[str, int] = field(default_factory=dict)
    """By the type of their state."""
    waiting: tuple[Waiting, ...] = ()
    alerts: tuple[AlertView, ...] | None = None
    """None: no Alertmanager answers."""

    @property
    def longest_waits(self) -> Mapping[str, float]:
        """By queue, of the flow run that waits longest."""
        return {run.queue: run.seconds for run in reversed(self.waiting)}


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The stack at one moment: all runs that are watched, the newest first."""

    at: float
    runs: tuple[RunView, ...]
    servers: Servers
    disk_bytes: int
    disk_free_bytes: int
    """Of the disk under the stack's folder."""
    links: Mapping[str, str]


def view_of(
    *,
    record: Record,
    preset: Preset,
    seen: Seen,
    maybe_job: JobStatus | None,
    is_at_work: bool,
    links: Mapping[str, str],
    now: float,
) -> RunView:
    """`maybe_job` is what the engine says of the run; None if it knows it no more."""
    progress, result = seen.progress, record.result
    state, why = _state(record, preset, seen, maybe_job, is_at_work=is_at_work, now=now)
    step, goal = (result.step if result else progress.step), preset.train.steps
    is_going = state in ("training", "recovering", "stalled")
    deadline = preset.launch.deadline_seconds
    return RunView(
        key=record.key,
        model=preset.name,
        at=now,
        state=state,
        why=why,
        step=step,
        goal_steps=goal,
        step_at=seen.step_at,
        steps_per_second=seen.steps_per_second,
        samples_per_second=seen.steps_per_second * preset.train.batch_size if seen.steps_per_second else None,
        loss=None if progress.loss is None else float(progress.loss),
        expected_end_at=now + (goal - step) / seen.steps_per_second if is_going and seen.steps_per_second else None,
        deadline_at=seen.began_at + deadline if deadline and seen.began_at else None,
        began_at=seen.began_at,
        ended_at=seen.newest_at if state in OVER else None,
        token=record.token,
        num_ranks=progress.num_ranks,
        group_nodes=record.num_nodes,
        wanted_nodes=preset.launch.nodes,
        engine=describe(maybe_job),
        checkpoint_step=result.checkpoint.step if result else progress.checkpoint_step,
        checkpoint_at=seen.checkpoint_at or seen.began_at,
        checkpoint_every_steps=preset.train.checkpoint_every_steps,
        num_attempts=len(record.attempt_starts),
        num_departures=len(record.departures),
        num_failures=num_failures(record),
        last_departure=_last_departure(record),
        attempts=_attempts(record, seen),
        seconds=seen.seconds(record),
        notes=tuple(note for note in (progress.slow, progress.balance) if note and state not in OVER),
        curve=seen.curve.points,
        links=links,
    )


def _state(
    record: Record, preset: Preset, seen: Seen, maybe_job: JobStatus | None, *, is_at_work: bool, now: float
) -> tuple[State, str]:
    if record.result is not None:
        return "finished", f"{len(record.attempt_starts)} attempts" if len(record.attempt_starts) > 1 else ""
    if record.failure is not None:
        return "failed", f"{record.failure.kind}: {record.failure.message}"
    if not is_at_work:
        return "stopped", "no engine works on it; the same command goes on from its checkpoint"
    nodes = maybe_job.nodes.values() if maybe_job is not None else ()
    if nodes and not any(state.startswith(AT_WORK) for state in nodes):
        return "waiting", f"for its engine: {describe(maybe_job)}"
    if not record.attempt_starts:
        return "starting", "its nodes look for one another"
    if seen.progress.trouble:
        return "recovering", seen.progress.trouble
    if seen.step_at is None:
        return "starting", "the first step is not done yet"
    if now - seen.step_at > preset.launch.hang_seconds:
        return "stalled", f"no finished step for {now - seen.step_at:.0f} s"
    if record.num_nodes < preset.launch.nodes:
        return "training", f"on {record.num_nodes} of {preset.launch.nodes} nodes"
    return "training", ""


def _last_departure(record: Record) -> Mapping[str, str]:
    if not record.departures:
        return {}
    last = record.departures[-1]
    return {"node": str(last.node), "class": last.class_name, "cause": last.cause}


def _attempts(record: Record, seen: Seen) -> tuple[AttemptView, ...]:
    found = [
        AttemptView(
            number=number,
            token=row["token"],
            began=row["began"],
            num_ranks=row["ranks"] or None,
            from_step=row["from_step"],
            source=row["from"],
            why_it_ended=row["why_it_ended"],
        )
        for number, row in enumerate(attempts_table(record, seen.begun), start=1)
    ]
    return tuple(found[-MAX_ATTEMPTS:])


def to_json(view: Any) -> Any:
    """A view as JSON has it: "nan" and "inf" are texts."""

    def sayable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: sayable(item) for key, item in value.items()}
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [sayable(item) for item in value]
        return json_number(value) if isinstance(value, float) else value

    return sayable(asdict(view))
