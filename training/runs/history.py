"""What a run did: the steps that count, whatever was done twice."""

from __future__ import annotations

from collections.abc import Iterator

from training.runs.events import Event, EventReader, committed
from training.runs.record import Record, RunRecord


def committed_steps(run: RunRecord, record: Record) -> list[Event]:
    """The step events that count, one per step, in order."""
    return committed(events_of(run, record), record.resume_steps)


def events_of(run: RunRecord, record: Record) -> Iterator[Event]:
    """All that was told of the run so far, whether it counts or not."""
    return EventReader(run.store, run.prefix(record)).read_new(newest_token=record.token)
