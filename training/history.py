"""What a run did: the steps that count, whatever was done twice."""

from __future__ import annotations

from training.events import Event, EventReader, committed
from training.record import Record, RunRecord


def committed_steps(run: RunRecord, record: Record) -> list[Event]:
    """The step events that count, one per step, in order."""
    events = EventReader(run.store, run.prefix(record)).read_new(newest_token=record.token)
    return committed(events, record.resume_steps)
