"""What is kept of a run's events while it is watched: as much for a long run as for a short one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tasks.follow import Follower, Progress
from training.runs.events import Event
from training.runs.goodput import Account, Use
from training.runs.record import Record

MAX_POINTS = 240
ACCOUNT_SHARE = 50
"""Booking the time of a run without checkpoints, which settles nothing, takes at most one in so many seconds."""
SPEED_SECONDS = 60
"""Over the newest of which the speed is measured, of one group."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One of the steps that are drawn. Samples per second are the mean since the point before."""

    step: int
    time: float
    loss: float
    samples_per_second: float | None


class Curve:
    """Evenly spaced steps that count, at most `MAX_POINTS`."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._every_steps = 1
        self._speeds: list[float] = []

    @property
    def points(self) -> tuple[Point, ...]:
        return tuple(self._points)

    def begin(self, step: int) -> None:
        """A group goes on after this step: what came later is done again."""
        self._points = [point for point in self._points if point.step <= step]
        self._speeds = []

    def add(self, event: Event) -> None:
        if self._points and event.step <= self._points[-1].step:
            return  # told again
        if speed := event.values.get("samples_per_second"):
            self._speeds.append(float(speed))
        if event.step % self._every_steps:
            return
        mean = sum(self._speeds) / len(self._speeds) if self._speeds else None
        loss = float(event.values["loss"])
        self._points.append(Point(step=event.step, time=event.time, loss=loss, samples_per_second=mean))
        self._speeds = []
        if len(self._points) > MAX_POINTS:
            self._every_steps *= 2
            self._points = [point for point in self._points if point.step % self._every_steps == 0]


class Seen:
    """Of one generation of a run, from its first event on."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._account = Account()
        self._seconds: Mapping[Use, float] = {}
        self._account_at = 0.0
        self.curve = Curve()
        self.begun: dict[int, Event] = {}
        """By token: the event of its beginning."""
        self.began_at: float | None = None
        self.newest_at: float | None = None
        self.step_at: float | None = None
        self.checkpoint_at: float | None = None
        self.steps_per_second: float | None = None
        self._marks: deque[Event] = deque(maxlen=SPEED_SECONDS)
        self._settled_step = 0
        self._settled_token = 0

    @property
    def progress(self) -> Progress:
        return self._follower.progress

    @property
    def generation(self) -> int:
        return self._follower.generation

    def look(self) -> Record:
        """Read what is new. Raises as `Follower.look`."""
        record, events = self._follower.look()
        self.take(events, record)
        return record

    def take(self, events: Sequence[Event], record: Record) -> None:
        for event in events:
            self._take(event)
        self._account.add(events)
        if record.checkpoints and record.checkpoints[-1].step > self._settled_step:
            self._settled_step, self._settled_token = record.checkpoints[-1].step, record.token
            self._account.settle(self._settled_step, record.resume_steps)

    def seconds(self, record: Record) -> Mapping[Use, float]:
        """Where the run's time went."""
        now = time.monotonic()
        if now >= self._account_at or record.result is not None:
            self._seconds = self._account.goodput(record.resume_steps).seconds
            self._account_at = now + ACCOUNT_SHARE * (time.monotonic() - now)
        return self._seconds

    def is_outdated_by(self, record: Record) -> bool:
        """Whether it must begin anew: another generation, or a group that went back behind what was settled."""
        starts = record.resume_steps[self._settled_token :]
        return record.generation != self.generation or _least(starts) < self._settled_step

    def _take(self, event: Event) -> None:
        self.began_at = event.time if self.began_at is None else min(self.began_at, event.time)
        self.newest_at = max(self.newest_at or 0.0, event.time)
        if event.kind == "attempt":
            self.begun[event.token] = event
            self.curve.begin(event.step)
            self._marks.clear()
        elif event.kind == "checkpoint":
            self.checkpoint_at = event.time
        elif event.kind == "step":
            self.step_at = max(self.step_at or 0.0, event.time)
            self.curve.add(event)
            self._mark(event)

    def _mark(self, event: Event) -> None:
        first = self._marks[0] if self._marks else event
        if event.time > first.time and event.step > first.step:
            self.steps_per_second = (event.step - first.step) / (event.time - first.time)
        if not self._marks or event.time >= self._marks[-1].time + 1.0:
            self._marks.append(event)


def _least(starts: Iterable[int | None]) -> float:
    return min((step for step in starts if step is not None), default=float("inf"))
