"""Where a run's time went, from its events alone: every second between its first and its last is booked once.

Goodput is the share of the wall time that went into steps which count in the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    events = list(events)
    counting = {(event.step, event.time) for event in committed(events, resume_steps)}
    seconds: dict[Use, float] = dict.fromkeys(USES, 0.0)
    if not events:
        return Goodput(seconds=seconds)
    now = min(event.time for event in events)
    between: Use = "waiting"
    for event in _in_time(events):
        if event.kind == "attempt":
            between = "recovery" if event.values["source"] == "memory" else "waiting"
        if event.kind != "step":
            continue
        begun = max(now, event.time - event.values.get("seconds", 0.0))  # steps of older versions did not tell
        seconds[between] += begun - now
        seconds["productive" if (event.step, event.time) in counting else "redone"] += max(0.0, event.time - begun)
        now = max(now, event.time)
        between = "validation" if event.values.get("validation") else "checkpoint"
    seconds[between] += max(event.time for event in events) - now
    return Goodput(seconds=seconds)


def _in_time(events: Iterable[Event]) -> list[Event]:
    """Each once: a group tells again of steps that were done before it."""
    first = {(event.kind, event.step, event.time): event for event in events}
    return sorted(first.values(), key=lambda event: event.time)
