"""How tests look at a run: its record, its MLflow run, its processes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import psutil

from infra.local import supervisor
from tasks.follow import Follower
from tasks.mlflow_client import RUN_KEY_TAG, connect
from tests.conftest import Stack
from tests.waiting import wait_until
from training.runs.record import RunRecord


def run_keys(stack: Stack) -> set[str]:
    return set(stack.store.list_folders("runs/"))


def wait_for_step(stack: Stack, before: set[str], *, step: int, timeout_seconds: float = 90.0) -> RunRecord:
    """The run that appeared since `before`, once it has done `step` steps and has a checkpoint."""

    def look() -> RunRecord | None:
        for key in run_keys(stack) - before:
            run = RunRecord(stack.store, key)
            record = run.find()
            if record is None or not record.checkpoints:
                continue
            follower = Follower(run, generation=record.generation, num_steps=0)
            follower.look()
            if follower.progress.step >= step:
                return run
        return None

    return wait_until(look, what=f"step {step} of a new run", timeout_seconds=timeout_seconds)


def processes(stack: Stack, module: str) -> list[psutil.Process]:
    """The stack's processes that run a module, such as `training.cluster.worker`."""
    found = []
    for process in supervisor.stack_processes(stack.home):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


def mlflow_runs(stack: Stack, key: str) -> list[Any]:
    client = connect(stack.settings.mlflow_uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, filter_string=f"tags.`{RUN_KEY_TAG}` = '{key}'"))


def loss_history(stack: Stack, run_id: str) -> list[tuple[int, float]]:
    client = connect(stack.settings.mlflow_uri)
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, "loss"))


def last_json(text: str) -> Any:
    """The JSON document that a command printed at the end of its output."""
    return json.loads(text[text.index("{\n") :])
