"""How an agent that dies is started again: at once, unless it keeps dying soon after its start."""

from __future__ import annotations

from collections.abc import Sequence

QUICK_SECONDS = 20.0
NUM_FREE_STARTS = 15
MAX_PAUSE_SECONDS = 10.0
NUM_STARTS_BEFORE_GIVING_UP = 60  # some seven minutes
EXIT_GIVEN_UP = 4
FINAL_CODES = (0, 2, 4)
"""Done, wrong input, a failure that would repeat: not started again."""


def quick_series(starts: Sequence[float], now: float) -> list[float]:
    """The last of `starts` that followed one another quickly, up to `now`; empty if the last one lived long enough."""
    series: list[float] = []
    later = now
    for start in reversed(starts):
        if not 0 <= later - start < QUICK_SECONDS:
            break
        series.insert(0, start)
        later = start
    return series


def pause_seconds(num_quick_starts: int) -> float:
    """How long to wait before one more start: at first not at all, since a killed node should be back at once."""
    if num_quick_starts < NUM_FREE_STARTS:
        return 0.0
    return min(2.0 ** min(num_quick_starts - NUM_FREE_STARTS, 10), MAX_PAUSE_SECONDS)
