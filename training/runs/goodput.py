"""Where a run's time went, from its events alone: every second between its first and its last is booked once.

Goodput is the share of the wall time that went into steps which count in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from training.runs.events import Event, committed

Use = Literal["productive", "redone", "recovery", "waiting", "checkpoint", "validation"]
USES: tuple[Use, ...] = ("productive", "redone", "recovery", "waiting", "checkpoint", "validation")
"""Steps that count. Steps that were done again. From a group's last step to the next group's first, if the state came
from memory; if it did not, nobody was there to hold it: then it was waiting. What lay between two steps of one group:
validation if there was one, else a checkpoint (or too little to tell)."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Seconds by use."""

    seconds: Mapping[Use, float]

    @property
    def wall_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Productive; 0 of no time at all."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds else 0.0


def account(events: Iterable[Event], resume_steps: Sequence[int | None]) -> Goodput:
    """Of the run so far."""
    found = Account()
    found.add(events)
    return found.goodput(resume_steps)


class Account:
    """Of a run that goes on. What is settled is kept as sums alone."""

    def __init__(self) -> None:
        self._booked = _Booked()
        self._open: list[Event] = []

    def add(self, events: Iterable[Event]) -> None:
        self._open += [event for event in events if self._booked.now is None or event.time > self._booked.now]

    def settle(self, step: int, resume_steps: Sequence[int | None]) -> None:
        """No group begins before this step any more. (If one does, only a new account of all events is right.)"""
        counting = committed(self._open, resume_steps)
        border = max((event.time for event in counting if event.step <= step), default=None)
        if border is not None:
            self._booked = _book(self._booked, [event for event in self._open if event.time <= border], counting)
            self._open = [event for event in self._open if event.time > border]

    def goodput(self, resume_steps: Sequence[int | None]) -> Goodput:
        booked = _book(self._booked, self._open, committed(self._open, resume_steps))
        if booked.now is not None:
            newest = max([booked.now, *(event.time for event in self._open)])
            booked.seconds[booked.between] += newest - booked.now
        return Goodput(seconds=booked.seconds)


@dataclass(frozen=True, kw_only=True)
class _Booked:
    """The time up to `now` (None: nothing happened yet), and what the time after it is for."""

    seconds: dict[Use, float] = field(default_factory=lambda: dict.fromkeys(USES, 0.0))
    now: float | None = None
    between: Use = "waiting"


def _book(before: _Booked, events: Iterable[Event], counting: Iterable[Event]) -> _Booked:
    counted = {(event.step, event.time) for event in counting}
    seconds, now, between = dict(before.seconds), before.now, before.between
    for event in in_time(events):
        now = event.time if now is None else now
        if event.kind == "attempt":
            between = "recovery" if event.values.get("source") == "memory" else "waiting"
        if event.kind != "step":
            continue
        begun = max(now, event.time - event.values.get("seconds", 0.0))  # steps of older versions did not tell
        seconds[between] += begun - now
        seconds["productive" if (event.step, event.time) in counted else "redone"] += max(0.0, event.time - begun)
        now = max(now, event.time)
        between = "validation" if event.values.get("validation") else "checkpoint"
    return _Booked(seconds=seconds, now=now, between=between)


def in_time(events: Iterable[Event]) -> list[Event]:
    """Each once: a group tells again of steps that were done before it."""
    first = {(event.kind, event.step, event.time): event for event in events}
    return sorted(first.values(), key=lambda event: event.time)
