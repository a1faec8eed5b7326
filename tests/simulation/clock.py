"""Simulated time: what happens next, and how each machine's clock shows it."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Agenda:
    """A heap of calls to come. Calls of one moment come in the order in which they were planned."""

    __slots__ = ("_calls", "_number", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._calls: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0

    def plan(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        heappush(self._calls, (self.now + delay, self._number, call, arguments))

    def step(self, until: float) -> bool:
        """Make the next call; False if there is none before `until`."""
        if not self._calls or self._calls[0][0] > until:
            return False
        self.now, _, call, arguments = heappop(self._calls)
        call(*arguments)
        return True


class Clock:
    """A machine's monotonic clock: it began somewhere, goes a little wrong, and may jump ahead (a machine asleep)."""

    __slots__ = ("_agenda", "_offset", "_rate")

    def __init__(self, agenda: Agenda, *, offset: float, rate: float) -> None:
        self._agenda = agenda
        self._offset = offset
        self._rate = rate

    def __call__(self) -> float:
        return self._offset + self._agenda.now * self._rate

    def jump(self, seconds: float) -> None:
        self._offset += seconds
