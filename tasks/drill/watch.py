"""One run, as it is seen from outside: its record, whenever that changed, and its events."""

from __future__ import annotations

import time

from tasks.drill.scene import Trial
from training.runs.events import Event, EventReader
from training.runs.record import Record

LOOK_SECONDS = 0.05
EVENT_SECONDS = 0.5
"""Events are sent once a second."""


class Watch:
    """Looks at a run, again and again. The store is asked directly, also while it is away for the run."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.begun_at = time.time()
        self.record: Record = trial.run.read()
        self.changes: list[tuple[float, Record]] = []
        """What the record was, and since when."""
        self.events: list[Event] = []
        self._reader = EventReader(trial.run.store, trial.run.prefix(self.record))
        self._next_events = 0.0

    def look(self) -> None:
        """Waits a moment first."""
        time.sleep(LOOK_SECONDS)
        record = self.trial.run.read()
        if record != self.record:
            self.record = record
            self.changes.append((time.time(), record))
        if time.monotonic() >= self._next_events or self.is_over:
            self.events += self._reader.read_new(newest_token=record.token)
            self._next_events = time.monotonic() + EVENT_SECONDS

    @property
    def is_over(self) -> bool:
        return self.record.result is not None or self.record.failure is not None

    @property
    def step(self) -> int:
        """The highest that was told of."""
        return max((event.step for event in self.events if event.kind == "step"), default=0)

    def has_stepped(self, *, after_token: int) -> bool:
        """Whether a later group has finished a step of its own."""
        begun = {event.token: event.step for event in self.events if event.kind == "attempt"}
        return any(
            event.kind == "step" and event.token > after_token and event.step > begun.get(event.token, event.step)
            for event in self.events
        )

    def world_sizes(self, *, after_token: int) -> list[int]:
        """How many ranks each later group had."""
        return [e.values["world_size"] for e in self.events if e.kind == "attempt" and e.token > after_token]

    def first_token_change(self, *, token: int) -> float | None:
        """When the record named a later group."""
        return next((at for at, record in self.changes if record.token > token), None)
