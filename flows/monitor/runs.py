"""The runs that an engine works on, and any other that is asked for: read from their records and events."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.monitor.agents import MAX_NODES, ask_agents
from flows.monitor.seen import Seen
from flows.monitor.view import RunView, view_of
from flows.reaper.decide import is_flow_run
from infra.launcher import JobState, JobStatus, Launcher
from infra.local.files import write_whole
from infra.settings import Settings
from tasks.follow import Follower
from tasks.mlflow_client import MACHINE_LEARNING
from training.cluster.links import Place
from training.cluster.metrics import short
from training.documents import parse, read_document
from training.errors import MissingError, UnbrokenError
from training.runs.finding import find_run
from training.runs.job import Job, read_jobs
from training.runs.record import Record, RunRecord, generation_prefix
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

KEPT_SECONDS = 3600.0
"""How long a run is told of after its end."""
LAST_WORDS_SECONDS = 10.0
"""How long it is still read."""
MAX_ASKED = 8
"""Runs that nobody watches, and that are kept because somebody asked for them."""


@dataclass(kw_only=True)
class Watched:
    """What is known of one run."""

    job: Job
    record: Record
    seen: Seen
    owners: Sequence[str] = ()
    maybe_status: JobStatus | None = None
    """What the engine says of it."""
    places: dict[int, Place] = field(default_factory=dict)
    place_marks: set[tuple[str, str]] = field(default_factory=set)
    ended_at: float = 0.0

    @property
    def is_at_work(self) -> bool:
        """As far as is known: an engine that does not answer has not stopped it."""
        return self.maybe_status is not None and self.maybe_status.state is not JobState.ENDED

    @property
    def is_active(self) -> bool:
        return self.is_at_work and self.record.result is None and self.record.failure is None


class Runs:
    """Those of one engine on one store. `look` is for one thread; all others may be called by any."""

    def __init__(self, settings: Settings, store: Store, launcher: Launcher) -> None:
        self._settings = settings
        self._store = store
        self._launcher = launcher
        self._watched: dict[str, Watched] = {}
        self._asked: OrderedDict[str, Watched] = OrderedDict()
        self._asking = threading.Lock()
        self._told: dict[str, str] = {}
        self.views: Mapping[str, RunView] = {}
        """By key, as of the last look."""

    def look(self) -> Mapping[str, RunView]:
        """Raises `InfrastructureError` if the engine is away."""
        jobs, now = self._launcher.jobs(), time.time()
        for key in [*jobs, *(key for key in self._watched if key not in jobs)]:
            try:
                self._look_at(key, jobs.get(key), now)
            except UnbrokenError as error:  # the store is away, or this run's objects are damaged: others are seen
                if self._told.get(key) != str(error):
                    log.warning("run %s: %s", short(key), error)
                self._told[key] = str(error)
        self._forget(now)
        self.views = {key: self._view(watched) for key, watched in self._watched.items()}
        return self.views

    def find(self, key: str) -> RunView:
        """A run with its nodes, be it one that no engine has any more, by its key or the beginning of it. Raises
        `UserError` if the store has none, or several, `MissingError` if none has trained it, `InfrastructureError` if
        the store or the engine is away, `DamagedError`."""
        if key not in self._watched:  # which is answered also while the store is away
            key = find_run(self._store, key).run_key
        watched, view = self._watched.get(key), self.views.get(key)
        if watched is None or view is None:  # or nobody has looked yet, after a start
            with self._asking:
                watched = self._read_once(key)
                view = self._view(watched)
        if not watched.is_active:
            return view
        places = list(watched.places.values())
        return replace(view, nodes=ask_agents(places), num_unasked_nodes=max(0, len(places) - MAX_NODES))

    def targets(self) -> list[dict[str, Any]]:
        """For Prometheus: `job` and `instance` only, as other labels would clash with the metrics' own."""
        return [
            {
                "targets": [f"{place.address}:{place.metrics_port}"],
                "labels": {"job": "unbroken_node", "instance": f"{short(run.record.key)}/node{place.node}"},
            }
            for run in self._watched.values()
            if run.is_active
            for place in run.places.values()
            if place.metrics_port
        ]

    def flow_runs(self, run: str) -> list[str]:
        """Prefect's, that asked for the run of that short key."""
        return [
            owner
            for key, watched in self._watched.items()
            if short(key) == run
            for owner in watched.owners
            if is_flow_run(owner)
        ]

    def _view(self, run: Watched) -> RunView:
        return view_of(
            record=run.record,
            preset=run.job.preset,
            seen=run.seen,
            maybe_job=run.maybe_status,
            is_at_work=run.is_at_work,
            links=self._links(run),
            now=time.time(),
        )

    def _links(self, run: Watched) -> dict[str, str]:
        """The page that says most of it first."""
        settings, found = self._settings, {}
        flow_runs = [owner for owner in run.owners if is_flow_run(owner)]
        if flow_runs and settings.maybe_prefect_api_url:
            found["Prefect"] = f"{settings.prefect_ui_url}/runs/flow-run/{flow_runs[-1]}"
        if settings.maybe_mlflow_uri:
            of_run = f"runs/{run.record.tracking_run_id}" if run.record.tracking_run_id else "experiments"
            found["MLflow"] = f"{settings.mlflow_uri}/#/{of_run}{MACHINE_LEARNING}"
        found["S3"] = self._store.location.uri(generation_prefix(run.record.key, run.record.generation))
        return found

    def _look_at(self, key: str, maybe_owners: Sequence[str] | None, now: float) -> None:
        """No owners: the engine knows the run no more."""
        maybe_status = None if maybe_owners is None else self._launcher.find(key)
        maybe_before = self._watched.get(key)
        if maybe_before is not None:
            maybe_before.maybe_status = maybe_status
            is_at_rest = not maybe_before.is_at_work  # one that failed, and is at work, was started again
            if maybe_before.ended_at and is_at_rest and now > maybe_before.ended_at + LAST_WORDS_SECONDS:
                return
        try:
            maybe_watched = self._read(key, maybe_before)
        except MissingError:  # it shards, or was removed
            self._watched.pop(key, None)
            return
        if maybe_watched is None:
            return
        maybe_watched.maybe_status = maybe_status
        if maybe_owners is not None:
            maybe_watched.owners = maybe_owners
        maybe_watched.ended_at = 0.0 if maybe_watched.is_active else maybe_watched.ended_at or now
        self._watched[key] = maybe_watched

    def _read(self, key: str, maybe_before: Watched | None) -> Watched | None:
        """What is new of it; None if nobody was told to train it. Raises `MissingError` if it has no record."""
        watched = maybe_before
        if watched is not None:
            watched.record = watched.seen.look()
        if watched is None or watched.seen.is_outdated_by(watched.record):
            watched = self._begin(key)
            if watched is None:
                return None
            watched.record = watched.seen.look()
        self._find_places(watched, f"{generation_prefix(key, watched.seen.generation)}nodes/")
        return watched

    def _begin(self, key: str) -> Watched | None:
        run = RunRecord(self._store, key)
        record = run.read()
        jobs = [job for job in read_jobs(self._store, key) if job.generation == record.generation]
        if not jobs:
            return None
        follower = Follower(run, generation=record.generation, num_steps=jobs[-1].preset.train.steps)
        return Watched(job=jobs[-1], record=record, seen=Seen(follower))

    def _read_once(self, key: str) -> Watched:
        watched = self._read(key, self._asked.pop(key, None))
        if watched is None:
            raise MissingError(f"run {short(key)} was never given to an engine: there is nothing to show of it")
        owners = self._launcher.jobs().get(key)
        watched.owners = owners or ()
        watched.maybe_status = None if owners is None else self._launcher.find(key)
        self._asked[key] = watched
        if len(self._asked) > MAX_ASKED:
            self._asked.popitem(last=False)
        return watched

    def _find_places(self, run: Watched, folder: str) -> None:
        entries = list(self._store.list_entries(folder))
        marks = {(entry.key, entry.etag) for entry in entries}
        if marks != run.place_marks:
            places = [parse(Place, read_document(self._store.get(entry.key), what=entry.key)) for entry in entries]
            run.places, run.place_marks = {place.node: place for place in places}, marks

    def _forget(self, now: float) -> None:
        for key, run in list(self._watched.items()):
            if run.ended_at and now - run.ended_at > KEPT_SECONDS:
                del self._watched[key]


def write_targets(path: Path, targets: list[dict[str, Any]]) -> None:
    """Only if they are others: Prometheus reads the file whenever it changes."""
    text = json.dumps(targets, indent=1)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
