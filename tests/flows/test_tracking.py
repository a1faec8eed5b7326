"""One MLflow run and one version, whoever races, and whatever somebody deleted in MLflow."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from threading import Barrier
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from flows.cli.follow import _Watcher
from infra.local.ports import free_port
from tasks import mlflow_client, registry, tracking
from tasks.follow import Follower
from tasks.forward import Forwarder
from tasks.lifecycle.model_file import KeptVersion, Signature, Tensor
from tasks.mlflow_client import RUN_KEY_TAG, WEIGHTS_TAG, connect
from tasks.quarantine import trained
from tasks.register import set_aliases
from tasks.results import Dataset
from tests.conftest import Stack
from tests.flows.runs import loss_history, mlflow_runs
from tests.unit.tiny import tiny_preset
from training.errors import DamagedError, FencedError, InfrastructureError, UserError
from training.preset_file import load_preset
from training.runs.events import Event, EventWriter
from training.runs.record import CheckpointRef, Departure, Record, Result, RunRecord, start_fresh, with_resume_step
from training.runs.system import SampleWriter, take_sample

DATASET = Dataset(name="tiny", digest="d" * 64, num_train_samples=1, num_test_samples=1, num_shards=2, num_bytes=2)


@pytest.fixture
def run(stack: Stack) -> RunRecord:
    run = RunRecord(stack.store, f"test-{uuid.uuid4().hex}")
    run.create_if_missing()
    return run


def ensure(stack: Stack, run: RunRecord, record: Record | None = None) -> tracking.Tracker:
    return tracking.ensure_run(
        stack.settings.mlflow_uri, run, record or run.read(), tiny_preset(), dataset=asdict(DATASET), tags={}
    )


def test_racing_starters_share_one_run(stack: Stack, run: RunRecord) -> None:
    record = run.read()
    with ThreadPoolExecutor(4) as pool:
        trackers = list(pool.map(lambda _: ensure(stack, run, record), range(4)))
    assert {tracker.run_id for tracker in trackers} == {run.read().tracking_run_id}
    assert [found.info.run_id for found in mlflow_runs(stack, run.run_key)] == [trackers[0].run_id]


def test_deleted_run_is_made_again(stack: Stack, run: RunRecord) -> None:
    first = ensure(stack, run)
    first.client.delete_run(first.run_id)
    second = ensure(stack, run)
    assert run.read().tracking_run_id == second.run_id != first.run_id
    assert [found.info.run_id for found in mlflow_runs(stack, run.run_key)] == [second.run_id]


def test_run_that_somebody_deleted_is_known_as_lost(stack: Stack, run: RunRecord) -> None:
    """So that a cached training of it is not taken for finished: it is to be shown again."""
    uri = stack.settings.mlflow_uri
    assert tracking.lost_run(uri, run.read()) is None
    tracker = ensure(stack, run)
    assert tracking.lost_run(uri, run.read()) is None
    tracker.client.delete_run(tracker.run_id)
    assert tracking.lost_run(uri, run.read()) == tracker.run_id


def test_starter_of_an_older_generation_leaves_no_run(stack: Stack, run: RunRecord) -> None:
    old = run.read()
    run.update(start_fresh)
    with pytest.raises(FencedError, match="begun anew"):
        ensure(stack, run, old)
    assert run.read().tracking_run_id is None
    assert mlflow_runs(stack, run.run_key) == []


def test_racing_registrations_make_one_version(stack: Stack, run: RunRecord) -> None:
    tracker = ensure(stack, run)
    name = f"model-{uuid.uuid4().hex}"
    together = Barrier(3)

    def save(folder: Path, model: Any) -> None:
        together.wait(30)
        save_program(folder, model)

    def register(_: int) -> str:
        version = registry.ensure_model_version(
            stack.settings.mlflow_uri, name, tracker, run_key=run.run_key, weights_sha256="w", tags={}, save=save
        )
        return str(version.version)

    with ThreadPoolExecutor(3) as pool:
        versions = list(pool.map(register, range(3)))
    left = [str(version.version) for version in tracker.client.search_model_versions(f"name = '{name}'")]
    assert versions == [min(versions)] * 3
    assert left == [min(versions)]


def save_program(folder: Path, model: Any) -> None:
    (folder / "data").mkdir(parents=True)
    (folder / registry.PROGRAM).write_bytes(f"program of {model.model_id}".encode())
    model.save(folder / "MLmodel")


def test_program_that_is_exchanged_in_the_bucket_is_not_taken_for_what_was_registered(
    stack: Stack, run: RunRecord
) -> None:
    """Its digest is in MLflow's database, where who writes the bucket does not."""
    uri, tracker = stack.settings.mlflow_uri, ensure(stack, run)
    name = f"model-{uuid.uuid4().hex}"
    version = registry.ensure_model_version(
        uri, name, tracker, run_key=run.run_key, weights_sha256="w", tags={}, save=save_program
    )
    program, _ = registry.program_of(uri, version)
    keys = [key for key, _ in stack.store.list_keys("mlflow/") if key.endswith(registry.PROGRAM)]
    (key,) = (key for key in keys if stack.store.get(key) == program)
    stack.store.put(key, b"another program")
    with pytest.raises(DamagedError, match=r"its data/model\.pt2 is not what was registered as version 1"):
        registry.program_of(uri, version)


def register_found(stack: Stack, tracker: tracking.Tracker, model: str, run_key: str) -> str:
    """Register weights of which there is a version: nothing is saved."""

    def save(folder: Path, model: Any) -> None:
        pytest.fail("it was made again")

    version = registry.ensure_model_version(
        stack.settings.mlflow_uri, model, tracker, run_key=run_key, weights_sha256="w", tags={}, save=save
    )
    return str(version.version)


def versions_of(tracker: tracking.Tracker, model: str) -> list[str]:
    return sorted(str(version.version) for version in tracker.client.search_model_versions(f"name = '{model}'"))


def test_twin_of_a_killed_starter_is_deleted_and_no_obstacle(stack: Stack, run: RunRecord, model: str) -> None:
    """Two raced, and one was killed before it could delete its own."""
    tracker = ensure(stack, run)
    first, twin = make_version(tracker, model, "key"), make_version(tracker, model, "key")
    assert aliases_given(stack, model, first, "key") == ("challenger", "champion"), "the twin is not newer"
    assert versions_of(tracker, model) == [first, twin]
    assert register_found(stack, tracker, model, "key") == first
    assert versions_of(tracker, model) == [first]


def test_twin_that_a_person_named_is_left(stack: Stack, run: RunRecord, model: str) -> None:
    tracker = ensure(stack, run)
    first, twin = make_version(tracker, model, "key"), make_version(tracker, model, "key")
    tracker.client.set_registered_model_alias(model, "mine", twin)
    assert register_found(stack, tracker, model, "key") == first
    assert versions_of(tracker, model) == [first, twin]


def test_two_may_delete_one_twin_at_once(
    stack: Stack, run: RunRecord, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = ensure(stack, run)
    first, twin = make_version(tracker, model, "key"), make_version(tracker, model, "key")
    delete = tracker.client.delete_model_version

    def delete_after_another(name: str, version: str) -> None:
        connect(stack.settings.mlflow_uri).delete_model_version(name, version)
        delete(name, version)

    monkeypatch.setattr(tracker.client, "delete_model_version", delete_after_another)
    assert register_found(stack, tracker, model, "key") == first
    assert versions_of(tracker, model) == [first]
    assert twin != first


@pytest.fixture
def model(stack: Stack) -> str:
    """A registered model without versions."""
    name = f"model-{uuid.uuid4().hex}"
    connect(stack.settings.mlflow_uri).create_registered_model(name)
    return name


def make_version(tracker: tracking.Tracker, model: str, run_key: str) -> str:
    """As `registry.ensure_model_version` leaves it."""
    tags = {RUN_KEY_TAG: run_key, WEIGHTS_TAG: "w", registry.ALIASES_DUE_TAG: "true"}
    made = tracker.client.create_model_version(model, source="s3://bucket/model", run_id=tracker.run_id, tags=tags)
    return str(made.version)


def aliases_given(stack: Stack, model: str, version: str, run_key: str) -> tuple[str, ...]:
    tensor = Tensor(dtype="float32", shape=(-1, 2))
    kept = KeptVersion(
        model=model,
        version=version,
        run_key=run_key,
        weights_sha256="w",
        dataset_digest="d",
        model_sha256="m",
        num_bytes=1,
        signature=Signature(inputs=tensor, outputs=tensor),
    )
    return set_aliases(stack.settings.mlflow_uri, stack.store, kept)


def test_registering_again_moves_no_alias_that_a_person_moved(stack: Stack, run: RunRecord, model: str) -> None:
    """The version is found, not made; `dvc repro` of an older run would else move the aliases back."""
    tracker = ensure(stack, run)
    first, second = make_version(tracker, model, "key 1"), make_version(tracker, model, "key 2")
    assert aliases_given(stack, model, first, "key 1") == ("champion",)
    assert aliases_given(stack, model, second, "key 2") == ("challenger",)
    tracker.client.set_registered_model_alias(model, "champion", second)
    tracker.client.set_registered_model_alias(model, "challenger", first)
    assert aliases_given(stack, model, first, "key 1") == ("challenger",)
    assert aliases_given(stack, model, second, "key 2") == ("champion",)


def test_aliases_that_are_due_are_given_but_no_champion_is_replaced(stack: Stack, run: RunRecord, model: str) -> None:
    """Whoever made the version died before; meanwhile a person named a champion."""
    tracker = ensure(stack, run)
    chosen, version = make_version(tracker, model, "key 1"), make_version(tracker, model, "key 2")
    tracker.client.set_registered_model_alias(model, "champion", chosen)
    assert aliases_given(stack, model, version, "key 2") == ("challenger",)
    assert registry.aliases_of(tracker.client, model, chosen) == ("champion",)


def test_progress_is_that_of_the_generation_that_trains(stack: Stack, run: RunRecord) -> None:
    """Not the finished one's, which `--fresh` is about to replace."""
    finished = Result(
        step=9, weights_sha256="w", state_sha256="s", checkpoint=CheckpointRef(step=9, token=1, sha256="")
    )
    run.update(lambda record: replace(record, result=finished))
    client: Any = None
    watcher = _Watcher(client, stack.store, load_preset("digits"), quiet=True)
    assert watcher._look(run) is None
    events = EventWriter(stack.store, run.prefix(run.update(start_fresh)), 1)
    events.add("step", step=3, **dict.fromkeys(tracking.METRICS, 0.5))
    events.close()
    progress = watcher._look(run)
    assert progress is not None
    assert progress.step == 3


def test_closing_a_run_does_not_hide_what_happened_before(stack: Stack, run: RunRecord) -> None:
    forwarder = Forwarder(run, run.read(), lambda: ensure(stack, run))
    tracker = forwarder.tracker()
    tracker.client = mlflow_client.connect(f"http://127.0.0.1:{free_port()}")
    assert not forwarder.send(run.read(), [])
    forwarder.close("FAILED")
    tracker.client = mlflow_client.connect(stack.settings.mlflow_uri)
    assert mlflow_runs(stack, run.run_key)[0].info.status == "RUNNING"
    forwarder.close("FAILED")
    assert mlflow_runs(stack, run.run_key)[0].info.status == "FAILED"


class Away:
    """An MLflow that is away as often as it is told to be."""

    def __init__(self, stack: Stack, run: RunRecord) -> None:
        self._stack, self._run = stack, run
        self.num_times = 1

    def open(self) -> tracking.Tracker:
        tracker = ensure(self._stack, self._run)
        batches = tracker.client.log_batch

        def log_batch(*arguments: Any, **values: Any) -> None:
            batches(*arguments, **values)
            if self.num_times:
                self.num_times -= 1
                raise MlflowException("it was done, and the reply was lost")

        tracker.client.log_batch = log_batch
        return tracker


def test_what_mlflow_missed_is_sent_when_it_is_back_and_only_once(stack: Stack, run: RunRecord) -> None:
    record = run.update(lambda record: with_resume_step(replace(record, token=1), 0, token=1))
    events = [
        Event(kind="step", time=1e9 + step, token=1, step=step, values=dict.fromkeys(tracking.METRICS, float(step)))
        for step in range(1, 700)
    ]
    samples = SampleWriter(stack.store, run.prefix(record), node=1, incarnation="a")
    for seconds in (-30.0, 2.0, 3.0):  # the first one before there was an MLflow run
        samples.send(replace(take_sample(), time=time.time() + seconds))
    away = Away(stack, run)
    forwarder = Forwarder(run, record, away.open)
    tries = [forwarder.send(record, events)]
    while not tries[-1]:
        away.num_times = int(len(tries) < 5)
        tries.append(forwarder.send(record, []))
    assert len(tries) == 6
    assert Forwarder(run, record, lambda: ensure(stack, run)).send(record, events), "another follower, from the start"
    client = connect(stack.settings.mlflow_uri)
    (tracked,) = mlflow_runs(stack, run.run_key)
    for name in tracking.METRICS:
        assert [point.step for point in client.get_metric_history(tracked.info.run_id, name)] == list(range(1, 700))
    for name in ("cpu_utilization_percentage", "network_receive_megabytes"):
        assert len(client.get_metric_history(tracked.info.run_id, f"system/node1/{name}")) == 3


def test_run_that_is_deleted_while_it_is_followed_is_told_anew_from_the_start(stack: Stack, run: RunRecord) -> None:
    record = run.update(lambda record: with_resume_step(replace(record, token=1), 0, token=1))
    writer = EventWriter(stack.store, run.prefix(record), 1)
    SampleWriter(stack.store, run.prefix(record), node=0, incarnation="a").send(take_sample())
    follower = Follower(run, generation=record.generation, num_steps=0)
    forwarder = Forwarder(run, record, lambda: ensure(stack, run, record))

    def forward(step: int) -> bool:
        writer.add("step", step=step, **dict.fromkeys(tracking.METRICS, float(step)))
        writer.flush()
        return forwarder.send(record, follower.look()[1])

    assert [forward(step) for step in (1, 2)] == [True, True]
    deleted = forwarder.tracker()
    deleted.client.delete_run(deleted.run_id)
    assert [forward(step) for step in (3, 4)] == [False, True]
    writer.close()
    (shown,) = mlflow_runs(stack, run.run_key)
    assert shown.info.run_id != deleted.run_id
    assert loss_history(stack, shown.info.run_id) == [(step, float(step)) for step in (1, 2, 3, 4)]
    name = "system/node0/cpu_utilization_percentage"
    assert len(deleted.client.get_metric_history(shown.info.run_id, name)) == 1


def test_attempts_are_a_table_beside_the_run(stack: Stack, run: RunRecord) -> None:
    left = Departure(token=1, node=0, cause="killed", step=3, class_name="Killed")
    run.update(lambda record: with_resume_step(replace(record, token=1, departures=(left,)), 0, token=1))
    record = run.update(lambda record: with_resume_step(replace(record, token=2), 3, token=2))
    begun = Event(kind="attempt", time=1e9, token=2, step=3, values={"world_size": 1, "source": "memory"})
    assert Forwarder(run, record, lambda: ensure(stack, run)).send(record, [begun])
    (tracked,) = mlflow_runs(stack, run.run_key)
    tags = {name: tracked.data.tags[f"unbroken.{name}"] for name in ("attempts", "departures", "last_departure")}
    assert tags == {"attempts": "2", "departures": "1", "last_departure": "killed"}
    table = mlflow.artifacts.load_dict(f"{tracked.info.artifact_uri}/{tracking.ATTEMPTS_FILE}")
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
        {"token": 1, "began": "", "ranks": "", "from_step": 0, "from": "", "why_it_ended": "node 0: killed"},
        {
            "token": 2,
            "began": "2001-09-09T01:46:40.000+00:00",
            "ranks": 1,
            "from_step": 3,
            "from": "memory",
            "why_it_ended": "",
        },
    ]


def test_deleted_experiment_is_named_and_how_to_restore_it(stack: Stack, run: RunRecord) -> None:
    """To have deleted it is a person's decision: nobody undoes it, and nobody calls it a server that is away."""
    uri, preset = stack.settings.mlflow_uri, replace(tiny_preset(), name=f"preset-{uuid.uuid4().hex}")

    def ensure_shown() -> tracking.Tracker:
        return tracking.ensure_run(uri, run, run.read(), preset, dataset=asdict(DATASET), tags={})

    tracker = ensure_shown()
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(UserError, match=f"{preset.name}.*restore --experiment-id {tracker.experiment_id}`"):
        ensure_shown()
    with pytest.raises(UserError, match="restore --experiment-id"):
        trained(preset, shard=nothing, train=nothing, quarantine=False)
    tracker.client.restore_experiment(tracker.experiment_id)
    assert ensure_shown().run_id == tracker.run_id
    tracking.require_shown(uri, preset)
    tracking.require_shown(f"http://127.0.0.1:{free_port()}", preset)  # away: it is shown later


def nothing(*_: object) -> Any:
    """A stage that costs much."""
    raise AssertionError("it was begun")


def test_newest_evaluation_is_shown_although_it_is_lower(stack: Stack, run: RunRecord) -> None:
    """With another [evaluate], of the same model, and so at the same step; each of them may be told twice."""
    tracker = ensure(stack, run)
    told = [{"test.accuracy": 0.9, "test.accuracy.low": 0.8}, {"test.accuracy": 0.9, "test.accuracy.low": 0.7}]
    for metrics in told:
        for _ in range(2):
            tracker.log_evaluation(metrics, {}, {}, b"")
        assert tracker.client.get_run(tracker.run_id).data.metrics == metrics
    for name in told[0]:
        values = [point.value for point in tracker.client.get_metric_history(tracker.run_id, name)]
        assert sorted(values) == sorted(metrics[name] for metrics in told)


def test_no_samples_are_lost_if_mlflow_fails_between_two_nodes(
    stack: Stack, run: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node's are counted as sent by then."""
    tracker = ensure(stack, run)
    history, failures = tracker.client.get_metric_history, [MlflowException("away")]

    def fail_once(run_id: str, name: str) -> Any:
        if "node1" in name and failures:
            raise failures.pop()
        return history(run_id, name)

    monkeypatch.setattr(tracker.client, "get_metric_history", fail_once)
    samples = [(node, take_sample()) for node in (0, 1)]
    with pytest.raises(InfrastructureError, match="away"):
        tracker.forward_samples(samples)
    tracker.forward_samples(samples)
    names = [f"system/node{node}/cpu_utilization_percentage" for node in (0, 1)]
    assert [len(history(tracker.run_id, name)) for name in names] == [1, 1]
