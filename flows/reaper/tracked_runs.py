"""MLflow's runs that say RUNNING: those of which nothing lives get the status that the run record tells."""

from __future__ import annotations

import logging
import time

from flows.reaper.attempt import attempt
from flows.reaper.decide import TrackedSight, TrackedVerdict, judge_tracked
from flows.reaper.signs import Signs
from infra.engines import make_launcher
from infra.launcher import Launcher
from infra.settings import Settings
from tasks import tracking
from tasks.unfollowed import Found, close, look
from training.errors import UnbrokenError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 10.0


class TrackedRuns:
    """Those of the runs on one store."""

    def __init__(self, uri: str, store: Store, launcher: Launcher) -> None:
        self._uri = uri
        self._store = store
        self._launcher = launcher
        self._signs = Signs()
        self._told: dict[str, str] = {}

    def set_right(self, *, now: float) -> None:
        """One look at each, and what follows from it. Raises `InfrastructureError` if MLflow is away."""
        runs = tracking.open_runs(self._uri, self._store)
        self._signs.begin_look({run.run_id for run in runs}, now=now)
        for run in runs:
            try:
                self._set_right(run, now)
            except UnbrokenError as error:  # such as a damaged record: the others are looked at all the same
                if self._told.get(run.run_id) != str(error):
                    log.warning("MLflow run %s of run %s: %s", run.run_id, run.run_key[:12], error)
                self._told[run.run_id] = str(error)

    def _set_right(self, run: tracking.OpenRun, now: float) -> None:
        found = look(self._store, run)
        verdict = judge_tracked(self._sight(run, found, now))
        if verdict is TrackedVerdict.LEAVE:
            return
        log.info("nobody follows MLflow run %s of run %s: %s", run.run_id, run.run_key[:12], verdict.value)
        if verdict is TrackedVerdict.DELETE:
            tracking.delete_run(self._uri, run.run_id)
        else:
            close(self._uri, self._store, run, found.maybe_record, verdict.value)

    def _sight(self, run: tracking.OpenRun, found: Found, now: float) -> TrackedSight:
        quiet = self._signs.seconds_unchanged(run.run_id, found.sign, now=now)
        record = found.maybe_record
        if record is None:
            return TrackedSight(quiet_seconds=quiet, is_removed=True)
        status = self._launcher.find(run.run_key)
        return TrackedSight(
            quiet_seconds=quiet,
            is_older=record.generation > run.generation,
            is_named=record.tracking_run_id == run.run_id,
            has_result=record.result is not None,
            has_failed=record.failure is not None,
            job=status.state if status else None,
        )


def watch_tracked_runs(settings: Settings, store: Store) -> None:
    """Look at them for ever. In a thread: an MLflow that hangs keeps nobody from looking at flow runs."""
    tracked_runs = TrackedRuns(settings.mlflow_uri, store, make_launcher(settings))
    while True:
        attempt("MLflow", lambda: tracked_runs.set_right(now=time.monotonic()))
        time.sleep(LOOK_SECONDS)
