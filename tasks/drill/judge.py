"""From what was seen of a run to its row: the numbers, and what was not as promised."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from tasks.drill import measure
from tasks.drill.faults import Fault
from tasks.drill.rows import Calm, Row
from tasks.drill.scene import Scene
from tasks.drill.watch import Watch
from training.data.audit import verify_run
from training.errors import DamagedError
from training.runs.events import committed
from training.runs.record import CheckpointRef, Record

PATIENCE_SECONDS = 30.0
"""From a fault to the next step, beyond what it takes to call a node silent or hung and to start all anew."""


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The run that the others are compared with."""

    record: Record
    points: Sequence[measure.Point]
    calm: Calm
    step_seconds: float
    start_seconds: float
    """From nothing to its first step."""


class Struck:
    """When and where a fault struck a run."""

    def __init__(self, fault: Fault, *, start_seconds: float) -> None:
        """`start_seconds`: what a run takes from nothing to its first step."""
        self.fault = fault
        self._start_seconds = start_seconds
        self.maybe_at: float | None = None
        self.token = 0
        """Of the group that was there."""
        self.maybe_newest: CheckpointRef | None = None
        self.complaints: list[str] = []

    @property
    def told(self) -> str:
        return "" if self.maybe_at is None else f", struck {time.time() - self.maybe_at:.0f} s ago"

    def look(self, scene: Scene, watch: Watch) -> None:
        """Fire, as soon as there are two checkpoints; from then on, see what comes of it."""
        if self.maybe_at is not None:
            self.fault.look(scene, watch, struck=self.token)
        elif len(watch.record.checkpoints) >= 2 and len(watch.record.members) == scene.preset.launch.nodes:
            self.maybe_at = time.time()
            self.token, self.maybe_newest = watch.record.token, watch.record.checkpoints[-1]
            try:
                self.fault.fire(scene, watch)
            except LookupError as error:
                self.complaints.append(f"it could not strike: {error}")

    def is_given_up(self, scene: Scene, watch: Watch) -> bool:
        """Whether nobody went on in time."""
        if self.maybe_at is None or not self.fault.ends_group or watch.has_stepped(after_token=self.token):
            return False
        launch = scene.preset.launch
        limit = launch.silence_seconds + launch.hang_seconds + 2 * self._start_seconds + PATIENCE_SECONDS
        if time.time() < self.maybe_at + limit:
            return False
        self.complaints.append(f"nobody went on within {limit:.0f} s")
        return True


def row_of(scene: Scene, watch: Watch, struck: Struck, undisturbed: Undisturbed) -> Row:
    """What came of a fault."""
    record, fault = watch.record, struck.fault
    points = measure.history(committed(watch.events, record.resume_steps))
    differences = _differences(record, points, undisturbed)
    complaints = [*struck.complaints, *differences]
    if record.result is not None:
        complaints += _ledger_complaints(scene)
    complaints += _broken_promises(watch, struck)
    complaints += always_promised(watch, num_nodes=scene.preset.launch.nodes, num_returns=fault.num_returns)
    return Row(
        fault=fault.name,
        title=fault.title,
        evidence=fault.evidence,
        otherwise=fault.otherwise,
        complaints=tuple(complaints),
        bits_equal=not differences,
        **_times(watch, struck),
        steps_redone=measure.num_redone(watch.events),
        is_redone_at_least=not measure.is_from_memory(watch.events, since=struck.token),
        samples_duplicated=measure.num_duplicated(points, batch_size=scene.preset.train.batch_size),
        num_groups=len(record.attempt_starts),
        run_seconds=time.time() - watch.begun_at,
    )


def _differences(record: Record, points: Sequence[measure.Point], undisturbed: Undisturbed) -> list[str]:
    """What is not the undisturbed run's."""
    if record.failure is not None:
        return [f"the run failed: {record.failure.message}"]
    if record.result is None:
        return ["the run did not end"]
    expected = undisturbed.calm
    found = []
    if (record.result.state_sha256, record.result.weights_sha256) != (expected.state_sha256, expected.weights_sha256):
        found.append(f"the state is another: {record.result.state_sha256[:12]}, not {expected.state_sha256[:12]}")
    step = measure.first_difference(points, undisturbed.points)
    if step is not None:
        found.append(f"the history is another from step {step} on")
    return found


def _ledger_complaints(scene: Scene) -> list[str]:
    """As `unbroken data verify-run` would find."""
    try:
        verify_run(scene.store, scene.key)
    except DamagedError as error:
        return [f"the ledger: {error}"]
    return []


def _broken_promises(watch: Watch, struck: Struck) -> list[str]:
    """What the run did wrong, although it may have come to the right end."""
    fault, newest = struck.fault, struck.maybe_newest
    if newest is None:
        return []
    found = fault.complaints(watch, newest)
    is_kept = measure.is_from_memory(watch.events, since=struck.token)
    if fault.leaves_memory and not is_kept:
        found.append("a group began with a checkpoint, although a process held the state")
    if fault.leaves_memory and (redone := measure.num_redone(watch.events)) > fault.max_redone:
        found.append(f"{redone} steps were done again, although a process held the state")
    if not fault.ends_group and watch.record.token > struck.token:
        found.append(f"ranks regrouped, although all were well; what the record says of it: {_causes(watch, struck)}")
    departures = {departure.class_name for departure in watch.record.departures if departure.token >= struck.token}
    if fault.departure and fault.evidence and fault.departure not in departures:
        noted = ", ".join(sorted(departures)) or "nothing"
        found.append(f"the record should say {fault.departure}, and says {noted}")
    return found


def _causes(watch: Watch, struck: Struck) -> str:
    departures = [departure for departure in watch.record.departures if departure.token >= struck.token]
    return "; ".join(f"node {departure.node}: {departure.cause}" for departure in departures) or "nothing"


def always_promised(watch: Watch, *, num_nodes: int, num_returns: int = 0) -> list[str]:
    """What a run did wrong, whatever happened to it. `num_returns`: of nodes that went away and are the same still."""
    found, record = [], watch.record
    begun = [event for event in watch.events if event.kind == "attempt"]
    causes = {departure.token for departure in record.departures}
    incarnations = {member.incarnation for _, seen in watch.changes for member in seen.members}
    num_causes = len(causes) + max(0, len(incarnations) - num_nodes) + num_returns
    num_groups = record.token - watch.trial.token_before
    num_regroups = (len(begun) if num_causes else num_groups) - 1  # undisturbed, no group ends before it has begun
    if num_regroups > num_causes:
        found.append(f"ranks regrouped {num_regroups} times, and had reason to {num_causes} times")
    told = max((event.step for event in watch.events if event.kind == "checkpoint"), default=0)
    named = max((checkpoint.step for checkpoint in record.checkpoints), default=0)
    if named < told:
        found.append(f"checkpoint {told} was proven, and the record names none after step {named}")
    return found


class _Times(TypedDict):
    detect_seconds: float | None
    next_step_seconds: float | None
    pause_seconds: float


def _times(watch: Watch, struck: Struck) -> _Times:
    at = struck.maybe_at
    if at is None:
        return {"detect_seconds": None, "next_step_seconds": None, "pause_seconds": 0.0}
    if struck.fault.ends_group:
        going = measure.next_step_time(watch.events, after=at, struck=struck.token)
        seen = [when for when in (watch.first_token_change(token=struck.token), going) if when is not None]
        noticed = min(seen, default=None)  # the record was looked at only now and then
    else:
        noticed, going = None, measure.next_step_of_any(watch.events, after=at)
    return {
        "detect_seconds": None if noticed is None else noticed - at,
        "next_step_seconds": None if going is None else going - at,
        "pause_seconds": measure.longest_pause(watch.events, since=at),
    }
