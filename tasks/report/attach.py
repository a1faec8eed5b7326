"""The report among the artifacts of the run's MLflow run: made again, it takes the place of the same."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from infra.settings import Settings
from tasks import tracking
from tasks.policy import patiently
from tasks.report.gather import gather
from tasks.report.page import page_of
from training.errors import InfrastructureError, UnbrokenError
from training.runs.record import RunRecord
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

FILE = "report.html"


def attach(settings: Settings, store: Store, run_key: str) -> str:
    """Make it and put it there; returns where a person sees it. Raises `InfrastructureError` if a server is away."""
    run = RunRecord(store, run_key)
    maybe_id = run.read().tracking_run_id
    if maybe_id is None:
        raise InfrastructureError(f"run {run_key[:12]} has no MLflow run yet")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        path.write_text(page_of(gather(settings, run)), encoding="utf-8")
        return tracking.attach_file(settings.mlflow_uri, maybe_id, path)


def attach_if_possible(settings: Settings, store: Store, run_key: str) -> str | None:
    """None if there is no report. The model is registered by now: no page about it is worth a failed run, and
    `unbroken report` tells the same error to whoever asks."""
    try:
        return patiently(lambda: attach(settings, store, run_key))
    except Exception as error:
        is_bug = not isinstance(error, UnbrokenError)
        log.warning("run %s has no report: %s", run_key[:12], error, exc_info=is_bug)
        return None
