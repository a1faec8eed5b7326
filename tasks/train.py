"""Stage 2: hand the run to the engine and follow it to its end. The engine trains on if this process dies."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from prefect import task

from infra.engines import make_launcher
from infra.launcher import JobSpec, JobState, Launcher, Needs
from infra.settings import Settings, signing_environment
from infra.store import store_location
from tasks import tracking
from tasks.bookmark import Bookmark, find_bookmark
from tasks.follow import Follower
from tasks.forward import Forwarder
from tasks.nodes import Nodes
from tasks.opening import Identity, identify, open_run
from tasks.policy import stage_options
from tasks.provenance import commit_of, keep_start
from tasks.pulse import Pulse
from tasks.results import Dataset, TrainedModel
from tasks.stack import open_stack
from training import errors
from training.checkpoints.trust import trusted_result
from training.config import Preset
from training.data.activity import distrust
from training.data.withdrawn import quarantined_records
from training.documents import digest_of
from training.errors import CancelledError, DamagedError, InfrastructureError
from training.runs.events import Event
from training.runs.identity import keep_identity
from training.runs.job import Job, agent_command, agent_environment, store_job
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LINE_SECONDS = 5.0
CATCH_UP_SECONDS = 600.0


def train_cache_key(context: Any, arguments: dict[str, Any]) -> str:
    preset: Preset = arguments["preset"]
    settings, store = open_stack()
    run = RunRecord(store, identify(preset, arguments["dataset"]).run_key)
    record = run.create_if_missing()  # a removed run, or one begun anew, is another one
    return digest_of(
        {
            "stage": "train",
            "run": run.run_key,
            "instance": record.instance,
            "generation": record.generation,
            "fresh": arguments.get("fresh"),
            "lost": _lost_run(settings, record),
        }
    )


def _lost_run(settings: Settings, record: Record) -> str | None:
    try:
        return tracking.lost_run(settings.mlflow_uri, record)
    except InfrastructureError as error:  # it stops no training; and what it may have lost, a later run makes again
        log.warning("%s", error)
        return None


@task(name="train", cache_key_fn=train_cache_key, **stage_options(timeout_seconds=7 * 24 * 3600))
def train(preset: Preset, dataset: Dataset, *, owner: str | None = None, fresh: str | None = None) -> TrainedModel:
    """Train on the engine's nodes, or find that it is done.

    `owner` names who started it (a flow run's id), so that cancelling the last one cancels this. `fresh`, any text,
    begins a new generation once per text, so that a retry does not begin anew.

    Raises the error class that the run failed with; `InfrastructureError` if the engine lost the job.
    """
    settings, store = open_stack()
    identity = identify(preset, dataset)
    run, record = open_run(store, identity, fresh)
    pulse = Pulse(store, record)
    pulse.beat()  # before there is an MLflow run that says RUNNING
    log.info("run key %s", run.run_key)

    def open_tracker() -> tracking.Tracker:
        tracker = tracking.ensure_run(
            settings.mlflow_uri,
            run,
            record,
            preset,
            dataset=asdict(dataset),
            tags=_tags(store, dataset, preset, record),
        )
        if record.result is None:
            tracker.reopen()
        return tracker

    forwarder = Forwarder(run, record, open_tracker)
    launcher = make_launcher(settings)
    try:
        if fresh is not None and not record.attempt_starts:
            _cancel(launcher, run, record)  # the agents of the generation before
        if record.result is None:
            _keep_origin(store, identity, record, owner=owner)
            if launcher.find(run.run_key) is not None:
                log.info("it is being trained already, on what it was started with; `unbroken runs cancel` ends that")
            launcher.submit(job_spec(settings, store, identity, record, owner=owner))
        bookmark = bookmark_of(store, record, forwarder)
        follower = Follower(run, generation=record.generation, num_steps=preset.train.steps, bookmark=bookmark)
        record = _follow(follower, forwarder, launcher, pulse, run.run_key)
        assert record.result is not None
    except CancelledError:
        forwarder.close("KILLED")
        raise
    except DamagedError:
        distrust(store, dataset.name)  # the next run looks at every shard again, and repairs from the source
        raise
    except (Exception, SystemExit):  # unless it has failed for good, the engine trains on for a retry
        raise
    except BaseException:  # Ctrl-C or a cancelled flow run; kill -9 does not come by here, and the engine trains on
        if _cancel(launcher, run, record, by=owner):
            forwarder.close("KILLED")
        raise
    log.info("step %d/%d  weights %s", preset.train.steps, preset.train.steps, record.result.weights_sha256[:12])
    forwarder.tracker().finish("FINISHED")
    _cancel(launcher, run, record)  # its agents are done; this clears the engine's table
    result = trusted_result(run, record)
    return TrainedModel(
        run_key=run.run_key,
        step=result.step,
        weights_sha256=result.weights_sha256,
        state_sha256=result.state_sha256,
    )


def _keep_origin(store: Store, identity: Identity, record: Record, *, owner: str | None) -> None:
    """What the run is a function of, and who starts it: `unbroken models why` tells, `verify` compares."""
    keep_identity(
        store,
        record.key,
        recipe=identity.recipe,
        preset=identity.preset,
        dataset_digest=identity.dataset_digest,
        initial_weights=identity.initial.weights_sha256 if identity.initial else None,
    )
    keep_start(store, record.key, identity.preset, generation=record.generation, flow_run=owner)


def _tags(store: Store, dataset: Dataset, preset: Preset, record: Record) -> dict[str, str]:
    tags = {"unbroken.commit": commit_of(preset), "unbroken.recipe": preset.recipe, "unbroken.preset": preset.name}
    tags |= tracking.quarantine_tags(quarantined_records(store, dataset.name))
    if record.continued is not None:
        tags["unbroken.continued"] = f"{record.continued.run_key} from step {record.continued.step}"
    return tags


def _cancel(launcher: Launcher, run: RunRecord, record: Record, *, by: str | None = None) -> bool:
    """Leave no process of this generation, unless it has owners besides `by`: False, then. The job of a newer one,
    begun by somebody else, is not ours to stop."""
    try:
        newest = run.read()
        is_ours = (newest.instance, newest.generation) == (record.instance, record.generation)
    except InfrastructureError:  # nobody can begin a new one either while the store is away
        is_ours = True
    return not is_ours or launcher.cancel(run.run_key, by=None if by is None else {by})


def job_spec(
    settings: Settings,
    store: Store,
    identity: Identity,
    record: Record,
    *,
    owner: str | None = None,
) -> JobSpec:
    """What an engine is asked to run for this run. Its agents find the rest on the store, where this puts it."""
    location = store_location(settings)
    job = Job(
        key=record.key,
        generation=record.generation,
        preset=identity.preset,
        dataset_digest=identity.dataset_digest,
        location=location,
        initial=identity.initial,
    )
    digest = store_job(store, job)
    launch = identity.preset.launch
    return JobSpec(
        key=record.key,
        num_nodes=launch.nodes,
        min_nodes=launch.min_nodes,
        needs=Needs.of(launch),
        command=agent_command(record.key, digest),
        environment={**agent_environment(location), **signing_environment(settings)},
        store=location.uri(),
        generation=record.generation,
        owner=owner,
    )


def bookmark_of(store: Store, record: Record, forwarder: Forwarder) -> Bookmark:
    """Where a new follower begins: at the start, if it is not known how far MLflow's points reach."""
    try:
        told_step = forwarder.tracker().last_step
    except InfrastructureError as error:
        log.warning("%s", error)
        return Bookmark(instance=record.instance)
    return find_bookmark(store, record, told_step=told_step)


def _follow(follower: Follower, forwarder: Forwarder, launcher: Launcher, pulse: Pulse, key: str) -> Record:
    """Forward events until the run is done."""
    nodes = Nodes(launcher, key)
    next_line = 0.0
    maybe_deadline: float | None = None
    while True:
        status = launcher.find(key)  # before the record: a job that ended by now has left its result there
        nodes.show(status)
        try:
            pulse.beat()
            record, events = follower.look()
        except InfrastructureError as error:
            if status is None or status.state is JobState.ENDED:
                raise
            log.warning("the run goes on, and nobody sees it: %s", error)
            time.sleep(LOOK_SECONDS)
            continue
        for event in events:
            if event.kind == "attempt" and event.values.get("source", "start") != "start":
                log.info(_resumption(event))
        is_told = forwarder.send(record, events) if record.generation == follower.generation else False
        if time.monotonic() > next_line:
            log.info(follower.progress.line())
            next_line = time.monotonic() + LINE_SECONDS
        if record.generation != follower.generation:
            raise CancelledError(f"run {key[:12]} was begun anew by somebody else")
        if record.failure is not None:
            forwarder.close("FAILED")
            raise errors.error_of(record.failure.kind, record.failure.message, record.failure.records)
        if record.result is not None:
            maybe_deadline = maybe_deadline or time.monotonic() + CATCH_UP_SECONDS
            if is_told:
                return record
            if time.monotonic() > maybe_deadline:
                raise InfrastructureError("the run is finished, but MLflow does not answer: its metrics wait on S3")
        elif status is None:
            raise CancelledError(f"run {key[:12]} was cancelled: its job is gone from the engine")
        elif status.state is JobState.ENDED:
            launcher.reap(key)  # its other nodes would wait for ever for the one that is gone
            forwarder.close("FAILED")  # a retry opens it again
            raise InfrastructureError(
                f"the engine's job ended without a result: see {', '.join(str(path) for path in launcher.logs(key))}"
            )
        if is_told:
            with suppress(InfrastructureError):  # a later look keeps it
                follower.keep_bookmark()
        time.sleep(LOOK_SECONDS)


def _resumption(event: Event) -> str:
    where = "memory" if event.values["source"] == "memory" else "the checkpoint"
    return f"{event.values['world_size']} ranks go on after step {event.step}, from {where} (token {event.token})"


def links(settings: Settings, run: RunRecord) -> dict[str, str]:
    """Where a person looks: the MLflow run and the run's objects. Raises `InfrastructureError` if a server is away."""
    record = run.read()
    found = {"s3": run.store.location.uri(f"runs/{run.run_key}/")}
    if record.tracking_run_id is not None:
        found["mlflow"] = tracking.url_of(settings.mlflow_uri, record.tracking_run_id)
    return found
