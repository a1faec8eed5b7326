"""The runs that an engine works on: their records, how their time was spent, and where their agents serve metrics."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flows.reaper.decide import is_flow_run
from infra.launcher import JobState, Launcher
from infra.local.files import write_whole
from infra.settings import Settings
from training.cluster.links import Place
from training.cluster.metrics import short
from training.documents import parse, read_document
from training.errors import UnbrokenError
from training.runs.events import Event, EventReader
from training.runs.exposition import Page
from training.runs.goodput import Use, account
from training.runs.job import Job, read_jobs
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

NOT_FINITE = re.compile(r"the loss is (nan|-?inf)|the gradient norm (nan|inf)")
KEPT_SECONDS = 3600.0
"""How long a run is told of after its end."""
ACCOUNT_SHARE = 50
"""Booking a long run's time takes at most one in so many seconds."""


@dataclass(kw_only=True)
class Watched:
    """What is known of one run."""

    record: Record
    job: Job
    owners: Sequence[str]
    is_at_work: bool
    reader: EventReader
    events: list[Event] = field(default_factory=list)
    places: dict[int, Place] = field(default_factory=dict)
    place_marks: set[tuple[str, str]] = field(default_factory=set)
    goodput_seconds: Mapping[Use, float] = field(default_factory=dict)
    account_at: float = 0.0
    ended_at: float = 0.0

    @property
    def is_active(self) -> bool:
        return self.is_at_work and self.record.result is None and self.record.failure is None


class Runs:
    """Those of one engine on one store."""

    def __init__(self, settings: Settings, store: Store, launcher: Launcher) -> None:
        self._settings = settings
        self._store = store
        self._launcher = launcher
        self._watched: dict[str, Watched] = {}
        self._told: dict[str, str] = {}

    def look(self) -> Page:
        """Raises `InfrastructureError` if the engine is away."""
        jobs = self._launcher.jobs()
        for key, owners in jobs.items():
            try:
                self._look_at(key, owners)
            except UnbrokenError as error:  # the store is away, or this run's objects are damaged: others are seen
                if self._told.get(key) != str(error):
                    log.warning("run %s: %s", short(key), error)
                self._told[key] = str(error)
        for key in [key for key in self._watched if key not in jobs]:
            self._watched[key].is_at_work = False
        self._forget(time.time())
        page = Page()
        for run in self._watched.values():
            add_run(page, run, self.link(run))
        return page

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

    def link(self, run: Watched) -> str:
        """To the page that says most of it."""
        flow_runs = [owner for owner in run.owners if is_flow_run(owner)]
        if flow_runs and self._settings.maybe_prefect_api_url:
            return f"{self._settings.prefect_ui_url}/runs/flow-run/{flow_runs[-1]}"
        return f"{self._settings.maybe_mlflow_uri or ''}/#/experiments?workflowType=machine_learning"

    def _look_at(self, key: str, owners: Sequence[str]) -> None:
        maybe_before = self._watched.get(key)
        status = self._launcher.find(key)
        is_at_work = status is not None and status.state is JobState.RUNNING
        if maybe_before is not None and maybe_before.ended_at and not is_at_work:
            return
        run = RunRecord(self._store, key)
        record = run.find()
        if record is None:  # it shards, or was removed
            return
        prefix = run.prefix(record)
        if maybe_before is None or maybe_before.record.generation != record.generation:
            jobs = [job for job in read_jobs(self._store, key) if job.generation == record.generation]
            if not jobs:
                return
            reader = EventReader(self._store, prefix)
            watched = Watched(record=record, job=jobs[-1], owners=owners, is_at_work=is_at_work, reader=reader)
            self._watched[key] = watched
        watched = self._watched[key]
        watched.record, watched.owners, watched.is_at_work = record, owners, is_at_work
        watched.ended_at = 0.0 if watched.is_active else watched.ended_at or time.time()
        watched.events += map(_slim, watched.reader.read_new(newest_token=record.token))
        self._find_places(watched, f"{prefix}nodes/")
        _book(watched)

    def _find_places(self, run: Watched, folder: str) -> None:
        entries = list(self._store.list_entries(folder))
        marks = {(entry.key, entry.etag) for entry in entries}
        if marks != run.place_marks:
            places = [parse(Place, read_document(self._store.get(entry.key), what=entry.key)) for entry in entries]
            run.places, run.place_marks = {place.node: place for place in places}, marks

    def _forget(self, now: float) -> None:
        for key, run in list(self._watched.items()):
            if not run.is_active:
                run.ended_at = run.ended_at or now
                if now - run.ended_at > KEPT_SECONDS:
                    del self._watched[key]


def write_targets(path: Path, targets: list[dict[str, Any]]) -> None:
    """Only if they are others: Prometheus reads the file whenever it changes."""
    text = json.dumps(targets, indent=1)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


def add_run(page: Page, run: Watched, link: str) -> None:
    labels, record, train = {"run": short(run.record.key)}, run.record, run.job.preset.train

    def add(name: str, value: float, help: str, **more: str) -> None:
        page.add(f"unbroken_run_{name}", value, help, {**labels, **more})

    add("info", 1, "The model that the run trains, and where to read more", model=run.job.preset.name, link=link)
    add("active", run.is_active, "1 while an engine works on the run and it is not over")
    add("token", record.token, "The fencing token: how often its set of nodes changed")
    add("attempts_total", len(record.attempt_starts), "Groups that began to train")
    add("goal_steps", train.steps, "Steps that the run is to make")
    add("wanted_nodes", run.job.preset.launch.nodes, "Nodes that the run asked for")
    add("group_nodes", record.num_nodes, "Nodes of its newest group")
    add("checkpoint_every_steps", train.checkpoint_every_steps, "Steps between two checkpoints")
    add("departures_total", len(record.departures), "How often a node left it by a failure, or was lost")
    if record.departures:
        last = record.departures[-1]
        help = "The last such node, and why"
        add("last_departure", 1, help, node=str(last.node), cause=last.cause[:200], **{"class": last.class_name})
    if record.failure is not None:
        cause = "loss not finite" if NOT_FINITE.search(record.failure.message) else record.failure.kind
        add("failed", 1, "The run stopped for good", cause=cause)
    steps = [event for event in run.events if event.kind == "step"]
    if steps:
        add("step", steps[-1].step, "The newest finished step that was told of")
        add("step_timestamp_seconds", steps[-1].time, "When it was finished")
    if run.events:
        _add_times(add, run)
    for use, seconds in run.goodput_seconds.items():
        add("seconds", seconds, "Where the run's time went; all uses add up to its wall time", use=use)


def _add_times(add: Any, run: Watched) -> None:
    began = min(event.time for event in run.events[:100])
    saved = [event for event in run.events if event.kind == "checkpoint"]
    help = "When its newest checkpoint was proven; before the first, when the run began"
    add("checkpoint_timestamp_seconds", saved[-1].time if saved else began, help)
    add("checkpoint_step", saved[-1].step if saved else 0, "The step of that checkpoint")
    if deadline := run.job.preset.launch.deadline_seconds:
        add("deadline_timestamp_seconds", began + deadline, "When the run is to be done")


def _slim(event: Event) -> Event:
    """What the account asks of it."""
    values: dict[str, Any] = {name: event.values[name] for name in ("seconds", "source") if name in event.values}
    values["validation"] = bool(event.values.get("validation"))
    return replace(event, values=values)


def _book(run: Watched) -> None:
    now = time.monotonic()
    if now >= run.account_at:
        run.goodput_seconds = account(run.events, run.record.resume_steps).seconds
        run.account_at = now + ACCOUNT_SHARE * (time.monotonic() - now)
