"""How tests look at a run: its record, its MLflow run, its processes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.sorting import FlowRunSort

from infra.local import supervisor
from tasks.follow import Follower
from tasks.mlflow_client import RUN_KEY_TAG, connect
from tasks.results import Registration
from tests.conftest import Stack
from tests.waiting import wait_until
from training.config import Preset
from training.runs.record import RunRecord


def run_keys(stack: Stack) -> set[str]:
    """Of all runs that have an object: a folder is there for some minutes after its last one."""
    return {key.split("/")[1] for key, _ in stack.store.list_keys("runs/")}


PATIENT = ("--set", "launch.silence_seconds=60", "--set", "launch.join_seconds=240")
"""Options of a run of several nodes: that this machine is busy is no fault."""
VIRTUAL_WORKERS = 8
"""Of digits."""


def at_leisure_while(slow: Path, *, after_step: int = 0, num_ranks: int = 1) -> tuple[str, ...]:
    """Options of a run that takes its time for as long as that file is there: one that nobody waits for leaves the CPU
    to the others. About so many steps are quick all the same, so that the file may be there from the start: a run is
    not over then, however long it takes somebody to see how far it is."""
    values = {
        "recipe": "tests.patient_recipe:Patient",
        "hyperparameters.slow_while": slow,
        "hyperparameters.num_quick": after_step * VIRTUAL_WORKERS // num_ranks,
    }
    return tuple(part for name, value in values.items() for part in ("--set", f"{name}={value}"))


def wait_for_step(stack: Stack, before: set[str], *, step: int) -> RunRecord:
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

    return wait_until(look, what=f"step {step} of a new run")


def processes(stack: Stack, module: str) -> list[psutil.Process]:
    """The stack's processes that run a module, such as `training.cluster.worker`."""
    found = []
    for process in supervisor.stack_processes(stack.home):
        with contextlib.suppress(psutil.Error):
            if module in process.cmdline():
                found.append(process)
    return found


def worker(stack: Stack) -> Any:
    """Prefect's, which starts flow runs."""
    return next(iter(p for p in processes(stack, "worker") if "start" in p.cmdline()), None)


def flow_processes(stack: Stack) -> list[Any]:
    """The processes that execute flow runs."""
    return processes(stack, "prefect.engine")


def newest_run(client: SyncPrefectClient) -> Any:
    latest = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC)  # 200 of them at most
    return max(latest, key=lambda run: str(run.created))


def newest_states(stack: Stack) -> list[str | None]:
    """Every state that the newest flow run had, oldest first."""
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        return [state.name for state in client.read_flow_run_states(newest_run(client).id)]


def mlflow_runs(stack: Stack, key: str) -> list[Any]:
    client = connect(stack.settings.mlflow_uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, filter_string=f"tags.`{RUN_KEY_TAG}` = '{key}'"))


def loss_history(stack: Stack, run_id: str) -> list[tuple[int, float]]:
    client = connect(stack.settings.mlflow_uri)
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, "loss"))


def register_one(preset: Preset) -> Registration:
    """What the pipeline makes of a preset, by the stages' functions in this process: a flow run imports all anew."""
    from tasks.evaluate import evaluate
    from tasks.register import register
    from tasks.shard import shard
    from tasks.train import train

    dataset = shard.fn(preset)
    model = train.fn(preset, dataset)
    return register.fn(preset, dataset, model, evaluate.fn(preset, dataset, model))


def last_json(text: str) -> Any:
    """The JSON document that a command printed at the end of its output."""
    return json.loads(text[text.index("{\n") :])
