"""Runs that MLflow shows as running: what there is of each, and its end told when nobody is left to tell it."""

from __future__ import annotations

from dataclasses import dataclass

from tasks import tracking
from tasks.bookmark import find_bookmark
from tasks.follow import Follower
from tasks.forward import Forwarder
from tasks.pulse import last_sign
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the store has of a run that MLflow shows as running."""

    maybe_record: Record | None
    sign: object
    """Changes as long as somebody follows the run, or its ranks train."""


def look(store: Store, run: tracking.OpenRun) -> Found:
    """Raises `InfrastructureError` if the store is away."""
    record = RunRecord(store, run.run_key).find()
    if record is None or (record.generation, record.tracking_run_id) != (run.generation, run.run_id):
        return Found(maybe_record=record, sign=None)
    return Found(maybe_record=record, sign=(record, last_sign(store, record)))


def close(uri: str, store: Store, run: tracking.OpenRun, record: Record | None, status: str) -> None:
    """Set its status, after all that its events tell and that no follower has forwarded.

    Raises `InfrastructureError` if MLflow or the store is away: then it is to be done again.
    """
    tracker = tracking.attach(uri, run.run_id)
    if record is not None and record.generation == run.generation:
        source = RunRecord(store, run.run_key)
        bookmark = find_bookmark(store, record, told_step=tracker.last_step)
        newest, events = Follower(source, generation=run.generation, num_steps=0, bookmark=bookmark).look()
        if not Forwarder(source, newest, lambda: tracker).send(newest, events):
            return  # the next look tries again
    tracker.finish(status)
