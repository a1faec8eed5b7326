"""What a follower tells MLflow. MLflow being away stops nothing: what it missed is sent when it is back."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from tasks.attempts import attempt_tags, attempts_table, begun_by_token
from tasks.follow import Follower
from tasks.tracking import Tracker
from training.errors import InfrastructureError
from training.runs.events import Event
from training.runs.record import Record, RunRecord
from training.runs.system import Sample, SampleReader

log = logging.getLogger(__name__)

LOOK_FOR_SAMPLES_SECONDS = 10.0


class Forwarder:
    """Sends a run's metrics, its attempts and its nodes' system metrics, each once.

    `open_tracker` makes or finds the MLflow run; it is asked until it succeeds.
    """

    def __init__(self, run: RunRecord, record: Record, open_tracker: Callable[[], Tracker]) -> None:
        self._run = run
        self._open_tracker = open_tracker
        self._maybe_tracker: Tracker | None = None
        self._samples = SampleReader(run.store, run.prefix(record))
        self._next_samples = 0.0
        self._waiting: list[Event] = []
        self._waiting_samples: list[tuple[int, Sample]] = []
        self._begun: dict[int, Event] = {}
        self._told: object = None

    def send(self, record: Record, events: list[Event]) -> bool:
        """Whether MLflow knows everything now."""
        self._waiting += events
        self._begun |= begun_by_token(events)
        now = time.monotonic()
        is_over = record.result is not None or record.failure is not None
        if is_over or now >= self._next_samples:
            self._waiting_samples += self._samples.read_new()
            self._next_samples = now + LOOK_FOR_SAMPLES_SECONDS
        try:
            self._send(record)
        except InfrastructureError as error:
            log.warning("%s", error)
            with contextlib.suppress(InfrastructureError):  # the next time, then
                self._begin_anew_if_deleted(record)
            return False
        return True

    def close(self, status: str) -> None:
        """Set the MLflow run's status. If MLflow is away, or was all the time, the reaper does it later."""
        try:
            if self._maybe_tracker is not None:
                self._maybe_tracker.finish(status)
        except InfrastructureError as error:
            log.warning("the MLflow run could not be closed: %s", error)

    def tracker(self) -> Tracker:
        """Raises `InfrastructureError` if MLflow is away."""
        if self._maybe_tracker is None:
            self._maybe_tracker = self._open_tracker()
            log.info("MLflow run %s", self._maybe_tracker.url)
        return self._maybe_tracker

    def _begin_anew_if_deleted(self, record: Record) -> None:
        """Somebody deleted the MLflow run: the next one is told all, from the start."""
        if self._maybe_tracker is None or not self._maybe_tracker.is_deleted():
            return
        _, self._waiting = Follower(self._run, generation=record.generation, num_steps=0).look()
        self._samples, self._waiting_samples = SampleReader(self._run.store, self._run.prefix(record)), []
        self._next_samples = 0.0
        self._maybe_tracker = self._told = None
        log.warning("the MLflow run was deleted: another one takes its place")

    def _send(self, record: Record) -> None:
        tracker = self.tracker()
        if self._waiting:
            tracker.forward(self._waiting)
            self._waiting = []
        if self._waiting_samples:
            tracker.forward_samples(self._waiting_samples)
            self._waiting_samples = []
        tags, table = attempt_tags(record), attempts_table(record, self._begun)
        if (tags, table) != self._told:
            tracker.note_attempts(tags, table)
            self._told = (tags, table)
