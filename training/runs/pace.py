"""Who is slow. In synchronous training a step takes all ranks equally long; they differ in how much of it they wait,
and in how many virtual workers they have."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

SLOW_FACTOR = 1.5
MAX_COMPARED_STEPS = 1000


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that all others would wait for, if it had as many virtual workers."""

    rank: int
    factor: float
    """Its time outside of collectives, of the others' median."""


def maybe_straggler(outside_seconds: Sequence[float]) -> Straggler | None:
    """The slowest rank, if it is far from the others. `outside_seconds`: what a step takes without waiting, by rank, if
    all have as many virtual workers."""
    if len(outside_seconds) < 2:
        return None
    slowest = max(range(len(outside_seconds)), key=outside_seconds.__getitem__)
    usual = statistics.median(seconds for rank, seconds in enumerate(outside_seconds) if rank != slowest)
    if outside_seconds[slowest] <= SLOW_FACTOR * usual or usual <= 0:
        return None
    return Straggler(rank=slowest, factor=outside_seconds[slowest] / usual)


class Pace:
    """What this rank's newest steps took, since it was last asked."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=MAX_COMPARED_STEPS)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def take_median(self) -> float:
        """Of a step; and begin anew."""
        median = statistics.median(self._seconds)
        self._seconds.clear()
        return median

    @property
    def seconds(self) -> Sequence[float]:
        return self._seconds
