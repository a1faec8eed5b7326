"""One MLflow run and one version, whoever races, and whatever somebody deleted in MLflow."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from infra.local.ports import free_port
from tasks import tracking
from tasks.results import Dataset
from tests.conftest import Stack
from tests.flows.runs import mlflow_runs
from tests.unit.tiny import tiny_preset
from training.errors import FencedError, InfrastructureError
from training.record import Record, RunRecord, start_fresh

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
        folder.mkdir()
        model.save(folder / "MLmodel")

    def register(_: int) -> str:
        version = tracking.ensure_model_version(
            stack.settings.mlflow_uri, name, tracker, run_key=run.run_key, weights_sha256="w", tags={}, save=save
        )
        return str(version.version)

    with ThreadPoolExecutor(3) as pool:
        versions = list(pool.map(register, range(3)))
    left = [str(version.version) for version in tracker.client.search_model_versions(f"name = '{name}'")]
    assert versions == [min(versions)] * 3
    assert left == [min(versions)]


def test_closing_a_run_does_not_hide_what_happened_before(stack: Stack, run: RunRecord) -> None:
    tracker = ensure(stack, run)
    tracker.client = tracking.connect(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(InfrastructureError):
        tracker.finish("FAILED")
    tracker.try_to_finish("FAILED")
