"""The reaper beside real servers: what it sets right when nobody else is left, and what it leaves alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client import orchestration
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Crashed, Failed, Pending, Running

import flows.reaper.__main__ as reaper
from flows.cli.follow import ask_to_cancel
from flows.publish import MACHINE_LABEL, machine_label
from flows.reaper import champions, sources
from flows.reaper.attempt import attempt
from flows.reaper.decide import END_SECONDS, GONE_SECONDS, QUIET_SECONDS, SILENT_SECONDS
from flows.reaper.engine_jobs import end_unwanted
from flows.reaper.flow_runs import FLOW_RUN_VARIABLE, FlowRuns
from flows.reaper.signs import MAX_GAP_SECONDS
from flows.reaper.tracked_runs import TrackedRuns
from infra.launcher import JobSpec
from infra.local import supervisor
from infra.local.launcher import LocalLauncher
from infra.local.ports import free_port
from infra.local.services import WORK_POOL
from tasks import mlflow_client, tracking
from tasks.pulse import Pulse
from tasks.results import Dataset
from tests.conftest import Stack
from tests.flows.runs import loss_history, mlflow_runs
from tests.unit.tiny import tiny_preset
from training.errors import DamagedError
from training.runs.events import EventWriter
from training.runs.record import CheckpointRef, Failure, Record, Result, RunRecord, start_fresh, with_resume_step

DATASET = Dataset(name="tiny", digest="d" * 64, num_train_samples=1, num_test_samples=1, num_shards=2, num_bytes=2)
REF = CheckpointRef(step=3, token=1, sha256="")
RESULT = Result(step=3, weights_sha256="w", state_sha256="s", checkpoint=REF)


@pytest.fixture(scope="module", autouse=True)
def _no_other_reaper(stack: Stack) -> Iterator[None]:
    """The stack's own goes by the clock of this machine: what is begun here it would end while it is looked at."""
    supervisor.remote(stack.home).stopProcess("reaper")
    yield
    supervisor.remote(stack.home).startProcess("reaper")


@pytest.fixture
def client(stack: Stack) -> Iterator[SyncPrefectClient]:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        yield client


@pytest.fixture
def launcher(stack: Stack) -> LocalLauncher:
    return LocalLauncher(stack.home)


@pytest.fixture
def run(stack: Stack) -> RunRecord:
    run = RunRecord(stack.store, f"test-{uuid.uuid4().hex}")
    run.create_if_missing()
    return run


def ensure(stack: Stack, run: RunRecord) -> tracking.Tracker:
    return tracking.ensure_run(
        stack.settings.mlflow_uri, run, run.read(), tiny_preset(), dataset=asdict(DATASET), tags={}
    )


def look_until_quiet(stack: Stack, launcher: LocalLauncher) -> None:
    """As many looks as the reaper takes until it acts on what does not change."""
    tracked_runs = TrackedRuns(stack.settings.mlflow_uri, stack.store, launcher)
    for now in range(0, int(QUIET_SECONDS + 2 * MAX_GAP_SECONDS), int(MAX_GAP_SECONDS)):
        tracked_runs.set_right(now=float(now))


def status(stack: Stack, run: RunRecord) -> str:
    (found,) = mlflow_runs(stack, run.run_key)
    return str(found.info.status)


def finished(record: Record) -> Record:
    return replace(record, result=RESULT)


def failed(record: Record) -> Record:
    return replace(record, failure=Failure(kind="DeterministicError", message="twice"))


@pytest.mark.parametrize(
    ("change", "told"),
    [(finished, "FINISHED"), (failed, "FAILED"), (start_fresh, "KILLED"), (lambda record: record, "KILLED")],
    ids=["result", "failure", "begun anew", "nothing"],
)
def test_mlflow_run_that_nobody_follows_gets_the_records_word(
    stack: Stack, launcher: LocalLauncher, run: RunRecord, change: Any, told: str
) -> None:
    ensure(stack, run)
    run.update(change)
    look_until_quiet(stack, launcher)
    assert status(stack, run) == told


def test_what_no_follower_sent_is_sent_before_the_run_is_closed(
    stack: Stack, launcher: LocalLauncher, run: RunRecord
) -> None:
    tracker = ensure(stack, run)
    run.update(lambda record: with_resume_step(replace(record, token=1), 0, token=1))
    writer = EventWriter(stack.store, run.prefix(run.read()), 1)
    for step in (1, 2, 3):
        writer.add("step", step=step, **dict.fromkeys(tracking.METRICS, float(step)))
    writer.close()
    run.update(finished)
    look_until_quiet(stack, launcher)
    assert loss_history(stack, tracker.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert status(stack, run) == "FINISHED"


def test_followed_run_stays_running(stack: Stack, launcher: LocalLauncher, run: RunRecord) -> None:
    """Although it has a result: whoever follows it may have much to send."""
    ensure(stack, run)
    run.update(finished)
    tracked_runs = TrackedRuns(stack.settings.mlflow_uri, stack.store, launcher)
    for look in range(10):
        Pulse(stack.store, run.read()).beat()
        tracked_runs.set_right(now=look * MAX_GAP_SECONDS)
    assert status(stack, run) == "RUNNING"


def test_run_of_another_store_is_not_judged(stack: Stack, launcher: LocalLauncher, run: RunRecord) -> None:
    tracker = ensure(stack, run)
    tracker.client.set_tag(tracker.run_id, mlflow_client.STORE_TAG, "s3://elsewhere/")
    look_until_quiet(stack, launcher)
    assert status(stack, run) == "RUNNING"


def test_run_whose_maker_died_before_it_was_named_is_deleted(
    stack: Stack, launcher: LocalLauncher, run: RunRecord
) -> None:
    provisional = ensure(stack, run)
    run.update(lambda record: replace(record, tracking_run_id=None))
    named = ensure(stack, run)
    run.update(finished)
    look_until_quiet(stack, launcher)
    assert [found.info.run_id for found in mlflow_runs(stack, run.run_key)] == [named.run_id] != [provisional.run_id]


def test_damaged_record_is_told_once_and_keeps_nobody_from_looking_at_the_others(
    stack: Stack, launcher: LocalLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [RunRecord(stack.store, f"test-{uuid.uuid4().hex}") for _ in range(3)]
    for run in runs:
        run.create_if_missing()
    first, _, last = (ensure(stack, run) for run in runs)
    for damaged in (runs[0], runs[2]):  # before and after the whole one, in whichever order MLflow names them
        stack.store.put(damaged.object_key, b"{}")
    look_until_quiet(stack, launcher)
    assert [status(stack, run) for run in runs] == ["RUNNING", "KILLED", "RUNNING"]
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert [sum(tracker.run_id in line for line in told) for tracker in (first, last)] == [1, 1]
    for run, tracker in ((runs[0], first), (runs[2], last)):
        tracker.client.delete_run(tracker.run_id)
        stack.store.delete(run.object_key)


Held = Callable[[State[Any]], FlowRun]


@pytest.fixture
def hold(client: SyncPrefectClient) -> Iterator[Held]:
    """Makes flow runs, in a state that is given, that no worker takes."""
    name = f"held-{uuid.uuid4().hex}"
    queue = client.create_work_queue(name, work_pool_name=WORK_POOL)
    client.update_work_queue(queue.id, is_paused=True)
    deployment = client.read_deployment_by_name("pipeline/digits")
    made = []

    def make(state: State[Any]) -> FlowRun:
        run = client.create_flow_run_from_deployment(deployment.id, state=state, work_queue_name=name)
        made.append(run.id)
        return client.read_flow_run(run.id)

    yield make
    for run_id in made:
        client.delete_flow_run(run_id)
    client.delete_work_queue_by_id(queue.id)


@pytest.fixture
def held(hold: Held) -> FlowRun:
    return hold(Running())


def submit(launcher: LocalLauncher, key: str, owner: str) -> None:
    waiting = (sys.executable, "-c", "import signal; signal.pause()")
    launcher.submit(JobSpec(key=key, num_nodes=1, command=waiting, environment={}, owner=owner))


def test_job_of_a_cancelled_flow_run_is_ended_although_no_hook_did(
    client: SyncPrefectClient, launcher: LocalLauncher, hold: Held
) -> None:
    gone, here, lost, over = map(hold, (Cancelled(), Running(), Crashed(), Failed()))
    owned = {
        "gone": [gone.id],
        "of two that are over": [gone.id, over.id],
        "and of one that nobody knows": [uuid.uuid4(), gone.id],
        "here": [here.id, gone.id],
        "to be resumed": [lost.id, gone.id],
        "a person's": ["somebody"],
    }
    jobs = {uuid.uuid4().hex: owners for owners in owned.values()}
    try:
        for key, owners in jobs.items():
            for owner in owners:
                submit(launcher, key, str(owner))
        end_unwanted(launcher, FlowRuns(client, launcher))
        assert [launcher.find(key) is None for key in jobs] == [True, True, True, False, False, False]
    finally:
        for key in jobs:
            launcher.cancel(key)


def test_job_that_is_asked_for_while_it_is_judged_goes_on(launcher: LocalLauncher) -> None:
    """Its last flow run was cancelled, and the next one comes in the moment in which Prefect is asked of it."""
    key, gone, here = (uuid.uuid4().hex for _ in range(3))

    def states(asked: set[str]) -> dict[str, str]:
        if gone in asked:
            submit(launcher, key, here)
        return dict.fromkeys(asked & {gone}, "CANCELLED")

    judging: Any = SimpleNamespace(states=states)
    submit(launcher, key, gone)
    try:
        end_unwanted(launcher, judging)
        assert launcher.jobs()[key] == [gone, here]
        assert launcher.find(key) is not None
    finally:
        launcher.cancel(key)


def test_flow_run_without_process_or_heartbeat_is_crashed_and_scheduled_again(
    client: SyncPrefectClient, launcher: LocalLauncher, held: FlowRun
) -> None:
    """It never ran on this machine: its heartbeats alone could tell that it lives."""
    flow_runs = FlowRuns(client, launcher)
    for now in range(0, int(SILENT_SECONDS) + 1, int(MAX_GAP_SECONDS)):
        flow_runs.set_right(now=float(now))
    assert states(client, held) == ["Running"]
    flow_runs.set_right(now=SILENT_SECONDS + 1)
    assert states(client, held) == ["Running", "Crashed", "AwaitingRetry"]


def test_crashed_flow_run_can_be_cancelled(client: SyncPrefectClient, launcher: LocalLauncher, hold: Held) -> None:
    """Else who presses Ctrl-C then is not heard: it would be resumed. One that is over stays as it is."""
    lost, over = hold(Crashed()), hold(Failed())
    for run in (lost, over):
        ask_to_cancel(client, run.id)
    assert (states(client, lost), states(client, over)) == (["Crashed", "Cancelling"], ["Failed"])
    flow_runs = FlowRuns(client, launcher)
    for now in (0.0, END_SECONDS + 1):
        flow_runs.set_right(now=now)
    assert states(client, lost)[2:] == ["Cancelled"]


@pytest.mark.parametrize(("num_tries_since", "seconds"), [(0, GONE_SECONDS), (1, SILENT_SECONDS)])
def test_flow_run_that_says_it_was_here_is_missed_sooner(
    client: SyncPrefectClient, launcher: LocalLauncher, held: FlowRun, num_tries_since: int, seconds: float
) -> None:
    """The reaper that had seen its process died with it. Since another try began, it may be elsewhere."""
    client.update_flow_run_labels(held.id, {MACHINE_LABEL: machine_label(held.run_count - num_tries_since)})
    flow_runs = FlowRuns(client, launcher)
    look_for(flow_runs, seconds)
    assert states(client, held) == ["Running"]
    flow_runs.set_right(now=seconds + 1)
    assert states(client, held) == ["Running", "Crashed", "AwaitingRetry"]


def test_next_try_may_take_its_time_to_begin(client: SyncPrefectClient, launcher: LocalLauncher, held: FlowRun) -> None:
    """Else a run that was resumed on a busy machine would be resumed again, and executed twice."""
    waiting = [sys.executable, "-c", "import signal; signal.pause()", "prefect.engine"]
    process = subprocess.Popen(waiting, env={**os.environ, FLOW_RUN_VARIABLE: str(held.id)})
    client.update_flow_run_labels(held.id, {MACHINE_LABEL: machine_label(held.run_count)})
    flow_runs = FlowRuns(client, launcher)
    flow_runs.set_right(now=0.0)
    process.kill()
    process.wait()
    look_for(flow_runs, GONE_SECONDS + 1)
    assert states(client, held) == ["Running", "Crashed", "AwaitingRetry"]
    client.set_flow_run_state(held.id, Pending(), force=True)
    look_for(flow_runs, SILENT_SECONDS, since=GONE_SECONDS + 2)
    assert states(client, held)[3:] == ["Pending"]


def look_for(flow_runs: FlowRuns, seconds: float, *, since: float = 0.0) -> None:
    """At the pace of a reaper that is not taken for one that slept."""
    for after in range(0, int(seconds) + 1, int(GONE_SECONDS)):
        flow_runs.set_right(now=since + after)
    flow_runs.set_right(now=since + seconds)


def states(client: SyncPrefectClient, run: FlowRun) -> list[str | None]:
    return [state.name for state in client.read_flow_run_states(run.id)]


def test_server_that_is_away_stops_nothing(
    stack: Stack, launcher: LocalLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    away = TrackedRuns(f"http://127.0.0.1:{free_port()}", stack.store, launcher)
    attempt("MLflow", lambda: away.set_right(now=0.0))
    with SyncPrefectClient(f"http://127.0.0.1:{free_port()}/api") as client:
        attempt("Prefect", lambda: FlowRuns(client, launcher).set_right(now=0.0))
    told = [record.getMessage().split()[0] for record in caplog.records if record.name == "flows.reaper"]
    assert told == ["MLflow", "Prefect"]


def test_damage_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def read() -> None:
        raise DamagedError("runs/key/record.json is damaged")

    attempt("MLflow", read)
    assert "runs/key/record.json is damaged" in caplog.text


class LookedTwiceError(Exception):
    """Ends the reaper."""


def test_mlflow_that_hangs_keeps_nobody_from_looking_at_flow_runs(
    client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would look at them so seldom that it takes itself for one that slept, and never sees a death."""
    hangs, never, looks = threading.Event(), threading.Event(), iter((True, False))

    def hang(_: TrackedRuns, *, now: float) -> None:
        hangs.set()
        never.wait()

    def look(_: FlowRuns, *, now: float) -> None:
        assert hangs.wait(60), "MLflow was never asked"
        if not next(looks):
            raise LookedTwiceError

    monkeypatch.setattr(TrackedRuns, "set_right", hang)
    monkeypatch.setattr(FlowRuns, "set_right", look)
    monkeypatch.setattr(sources, "watch_sources", never.wait)
    monkeypatch.setattr(champions, "watch_champions", lambda *_: never.wait())
    monkeypatch.setattr(orchestration, "get_client", lambda *, sync_client: contextlib.nullcontext(client))
    monkeypatch.setattr(reaper, "LOOK_SECONDS", 0.0)
    with pytest.raises(LookedTwiceError):
        reaper.main()
