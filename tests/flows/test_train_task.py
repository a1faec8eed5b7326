"""The train stage around its engine: which finished work it takes for its own, and which jobs it stops."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.launcher import JobSpec, JobState, JobStatus
from infra.local.ports import free_port
from tasks import train as stage
from tasks.follow import Follower
from tasks.opening import identify, open_run, require_begun
from tasks.pulse import BEAT_SECONDS, Pulse, last_sign
from tasks.results import Dataset
from tasks.stack import open_stack
from tests.conftest import Stack
from training.environment import fingerprint
from training.errors import CancelledError, InfrastructureError, UserError
from training.preset_file import load_preset
from training.recipe import load_recipe
from training.runs.events import Event
from training.runs.identity import keep_identity
from training.runs.record import CheckpointRef, Failure, Record, Result, RunRecord, start_fresh
from training.s3.objectstore import Store

RESULT = Result(step=1, weights_sha256="w", state_sha256="s", checkpoint=CheckpointRef(step=1, token=1, sha256=""))
DATASET = Dataset(name="digits", digest="", num_train_samples=1, num_test_samples=1, num_shards=2, num_bytes=2)


class FakeEngine:
    """A job that is as it is told to be."""

    def __init__(self, status: JobStatus | None, *, others: bool = False) -> None:
        """`others` own it, too."""
        self.status = status
        self.others = others
        self.cancelled: list[str] = []
        self.reaped: list[str] = []

    def submit(self, spec: JobSpec) -> None:
        raise AssertionError("nothing is submitted here")

    def find(self, key: str) -> JobStatus | None:
        return self.status

    def jobs(self) -> Mapping[str, Sequence[str]]:
        return {}

    def logs(self, key: str) -> Sequence[Path]:
        return [Path("node0.log")]

    def reap(self, key: str) -> None:
        self.reaped.append(key)

    def cancel(self, key: str, *, by: set[str] | None = None) -> bool:
        if by is not None and self.others:
            return False
        self.cancelled.append(key)
        return True


RUNNING = JobStatus(state=JobState.RUNNING, nodes={"node0": "RUNNING"})
ENDED = JobStatus(state=JobState.ENDED, nodes={"node0": "EXITED", "node1": "RUNNING"})


@pytest.fixture
def arguments(stack: Stack) -> dict[str, Any]:
    return {"preset": load_preset("digits"), "dataset": replace(DATASET, digest=uuid.uuid4().hex), "fresh": None}


@pytest.fixture
def run(stack: Stack) -> RunRecord:
    run = RunRecord(stack.store, f"test-{uuid.uuid4().hex}")
    run.create_if_missing()
    return run


def test_cached_training_is_that_of_this_very_run(stack: Stack, arguments: dict[str, Any]) -> None:
    """The key stays while the run does; a run that was removed, or begun anew, has another one."""
    run = RunRecord(stack.store, identify(arguments["preset"], arguments["dataset"]).run_key)
    first = stage.train_cache_key(None, arguments)
    assert stage.train_cache_key(None, arguments) == first
    assert stage.train_cache_key(None, {**arguments, "fresh": "me"}) != first
    run.update(start_fresh)
    anew = stage.train_cache_key(None, arguments)
    stack.store.delete(run.object_key)
    removed = stage.train_cache_key(None, arguments)
    assert len({first, anew, removed}) == 3


def test_cache_key_does_not_need_mlflow(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It only tells whether somebody deleted the run there."""
    key = stage.train_cache_key(None, arguments)
    run = RunRecord(open_stack()[1], identify(arguments["preset"], arguments["dataset"]).run_key)
    run.update(lambda record: replace(record, tracking_run_id="somewhere"))
    monkeypatch.setenv("UNBROKEN_MLFLOW_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # what opening the stack puts there is gone after this test
    assert stage.train_cache_key(None, arguments) == key


def test_resuming_says_why_there_is_nothing_to_go_on_with(stack: Stack, arguments: dict[str, Any]) -> None:
    """A cosine ends with the run: one of more steps has other learning rates from the second step on."""
    preset, dataset = arguments["preset"], arguments["dataset"]
    shorter = identify(replace(preset, train=replace(preset.train, steps=100)), dataset)
    with pytest.raises(UserError, match=r"was never begun; leave the option out to begin it$"):
        require_begun(stack.store, shorter)
    run, _ = open_run(stack.store, shorter, None)
    recipe = load_recipe(shorter.preset)
    keep_identity(stack.store, run.run_key, recipe=recipe, preset=shorter.preset, dataset_digest=shorter.dataset_digest)
    proven = CheckpointRef(step=100, token=1, sha256="")
    run.update(lambda record: replace(record, checkpoints=(proven,), environment=fingerprint()))
    with pytest.raises(UserError, match=f"run {run.run_key[:12]} .* its learning rates are others from step 2 on"):
        require_begun(stack.store, identify(preset, dataset))
    open_run(stack.store, identify(preset, dataset), None)  # it begins at step 0 then


def test_job_of_a_newer_generation_is_left_alone(run: RunRecord) -> None:
    engine, old = FakeEngine(RUNNING), run.read()
    run.update(start_fresh)
    stage._cancel(engine, run, old)
    stage._cancel(engine, run, replace(run.read(), instance="a run that was removed"))
    assert engine.cancelled == []
    stage._cancel(engine, run, run.read())
    assert engine.cancelled == [run.run_key]


def test_job_that_others_own_too_goes_on_without_one_of_its_owners(run: RunRecord) -> None:
    """And nobody calls its MLflow run killed."""
    engine = FakeEngine(RUNNING, others=True)
    assert not stage._cancel(engine, run, run.read(), by="me")
    assert engine.cancelled == []
    assert stage._cancel(engine, run, run.read()), "a person's word is for everybody"
    assert engine.cancelled == [run.run_key]


def test_job_is_stopped_although_the_store_is_away(stack: Stack) -> None:
    engine = FakeEngine(RUNNING)
    away = Store(replace(stack.location, endpoint=f"http://127.0.0.1:{free_port()}"))
    stage._cancel(engine, RunRecord(away, "key"), Record(key="key"))
    assert engine.cancelled == ["key"]


class FakeForwarder:
    """Notes what the MLflow run is closed as."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def send(self, record: Record, events: list[Event]) -> bool:
        return True

    def close(self, status: str) -> None:
        self.closed.append(status)


def follow(run: RunRecord, engine: FakeEngine, forwarder: Any = None) -> None:
    pulse = Pulse(run.store, run.read())
    follower = Follower(run, generation=0, num_steps=1)
    stage._follow(follower, forwarder or FakeForwarder(), engine, pulse, run.run_key)


def test_follower_of_a_run_that_was_begun_anew_says_so(run: RunRecord) -> None:
    run.update(start_fresh)
    with pytest.raises(CancelledError, match="begun anew"):
        follow(run, FakeEngine(RUNNING))


def test_gang_that_is_not_whole_any_more_is_ended_and_named(run: RunRecord) -> None:
    """Its MLflow run says so; a retry opens it again. Another follower is not told that somebody cancelled."""
    engine, forwarder = FakeEngine(ENDED), FakeForwarder()
    with pytest.raises(InfrastructureError, match=r"without a result: see node0\.log"):
        follow(run, engine, forwarder)
    assert (engine.reaped, engine.cancelled, forwarder.closed) == ([run.run_key], [], ["FAILED"])


class AwayForAWhile(Follower):
    """As if the store did not answer at first."""

    num_left = 3

    def look(self) -> tuple[Record, list[Event]]:
        if self.num_left:
            self.num_left -= 1
            raise InfrastructureError("the store is away")
        return super().look()

    def keep_bookmark(self) -> None:
        raise InfrastructureError("the store is away again")


def test_a_store_that_is_away_ends_no_follower_of_a_job_that_runs(run: RunRecord) -> None:
    run.update(lambda record: replace(record, result=RESULT))
    follower = AwayForAWhile(run, generation=0, num_steps=1)
    followed = (FakeForwarder(), FakeEngine(RUNNING), Pulse(run.store, run.read()), run.run_key)
    assert stage._follow(follower, *followed).result == RESULT  # type: ignore[arg-type]
    assert follower.num_left == 0

    with pytest.raises(InfrastructureError, match="the store is away"):
        stage._follow(AwayForAWhile(run, generation=0, num_steps=1), followed[0], FakeEngine(ENDED), *followed[2:])  # type: ignore[arg-type]


def test_run_that_was_given_up_is_not_shown_as_running(run: RunRecord) -> None:
    run.update(lambda record: replace(record, failure=Failure(kind="InfrastructureError", message="21 restarts")))
    forwarder = FakeForwarder()
    with pytest.raises(InfrastructureError, match="21 restarts"):
        follow(run, FakeEngine(RUNNING), forwarder)
    assert forwarder.closed == ["FAILED"]


def test_job_that_the_engine_does_not_know_was_cancelled(run: RunRecord) -> None:
    with pytest.raises(CancelledError, match="gone from the engine"):
        follow(run, FakeEngine(None))


def test_follower_gives_signs_of_life(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1.0]
    monkeypatch.setattr("tasks.pulse.time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert last_sign(run.store, run.read()) == b""
    with pytest.raises(CancelledError):
        follow(run, FakeEngine(None))
    first = last_sign(run.store, run.read())
    assert first
    pulse = Pulse(run.store, run.read())
    pulse.beat()
    second = last_sign(run.store, run.read())
    assert second != first
    pulse.beat()
    assert last_sign(run.store, run.read()) == second, "it is not time yet"
    clock[0] += BEAT_SECONDS
    pulse.beat()
    assert last_sign(run.store, run.read()) != second
