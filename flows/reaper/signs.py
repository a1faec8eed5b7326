"""When something was last seen to change, by this process's own clock: no two machines' clocks are compared."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any

MAX_GAP_SECONDS = 30.0


class Signs:
    """What was seen last of each thing, and since when it is so."""

    def __init__(self) -> None:
        self._seen: dict[Hashable, tuple[Any, float]] = {}
        self._looked_at = 0.0

    def seconds_unchanged(self, thing: Hashable, value: Any, *, now: float) -> float:
        """How long `thing` has had this value; 0 if it is seen for the first time, or has changed."""
        last = self._seen.get(thing)
        if last is None or last[0] != value:
            self._seen[thing] = last = (value, now)
        return now - last[1]

    def begin_look(self, things: Collection[Hashable], *, now: float) -> None:
        """Forget all but `things`; and all of them if the look before was long ago.

        A server was away then, or the machine asleep: those who live had no way to show it either.
        """
        is_late = now - self._looked_at > MAX_GAP_SECONDS
        self._looked_at = now
        self._seen = {} if is_late else {thing: seen for thing, seen in self._seen.items() if thing in things}
