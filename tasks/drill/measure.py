"""What a run's events say of a fault in it: pure functions, from events to numbers. Times are of the wall clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from training.runs.events import Event

Point = tuple[int, float, float, str]
"""A step that counts: its number, loss, gradient norm and line in the ledger."""


def history(committed: Iterable[Event]) -> list[Point]:
    """What two runs of one key must have in common, step by step."""
    return [
        (event.step, float(event.values["loss"]), float(event.values["grad_norm"]), str(event.values["samples"]))
        for event in committed
    ]


def first_difference(points: Sequence[Point], expected: Sequence[Point]) -> int | None:
    """The first step (from 1) in which two histories differ, be it that one lacks it; None if they are the same."""
    for step, pair in enumerate(zip(points, expected, strict=False), start=1):
        if repr(pair[0]) != repr(pair[1]):  # NaN is like NaN
            return step
    return None if len(points) == len(expected) else min(len(points), len(expected)) + 1


def steps_of(events: Iterable[Event]) -> list[Event]:
    """Each finished step once, in time: a group tells again of steps that were done before it."""
    first = {(event.step, event.time): event for event in reversed(list(events)) if event.kind == "step"}
    return sorted(first.values(), key=lambda event: event.time)


def next_step_time(events: Sequence[Event], *, after: float, struck: int) -> float | None:
    """When a group with a later token than `struck` finished its first step of its own, after that time."""
    begun = {event.token: event.step for event in events if event.kind == "attempt"}
    times = [
        event.time
        for event in events
        if event.kind == "step"
        and event.token > struck
        and event.time > after
        and event.step > begun.get(event.token, 0)
    ]
    return min(times, default=None)


def next_step_of_any(events: Sequence[Event], *, after: float) -> float | None:
    """When the first step after that time was finished, whichever group it was."""
    return min((event.time for event in steps_of(events) if event.time > after), default=None)


def longest_pause(events: Sequence[Event], *, since: float) -> float:
    """Seconds between two steps finished one after another, of which the later came after that time."""
    pairs = pairwise(event.time for event in steps_of(events))
    return max((later - earlier for earlier, later in pairs if later > since), default=0.0)


def num_redone(events: Sequence[Event]) -> int:
    """Steps that were told as finished before a group began, and that lay beyond where it began."""
    redone = 0
    for attempt in (event for event in events if event.kind == "attempt"):
        before = [e.step for e in events if e.kind == "step" and e.time < attempt.time and e.token <= attempt.token]
        redone += max(0, max(before, default=0) - attempt.step)
    return redone


def is_from_memory(events: Sequence[Event], *, since: int) -> bool:
    """Whether each group with a later token than `since` went on from what a process held in memory."""
    return all(
        event.values["source"] == "memory" for event in events if event.kind == "attempt" and event.token > since
    )


def num_duplicated(points: Sequence[Point], *, batch_size: int) -> int:
    """Samples of steps whose line in the ledger another step has too: these read the same once more."""
    lines = [line for _, _, _, line in points]
    return (len(lines) - len(set(lines))) * batch_size


def median_step_seconds(events: Sequence[Event]) -> float:
    """Between two steps of one group; 0 if there are no two."""
    steps = steps_of(events)
    gaps = sorted(later.time - earlier.time for earlier, later in pairwise(steps) if earlier.token == later.token)
    return gaps[len(gaps) // 2] if gaps else 0.0
