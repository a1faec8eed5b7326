"""`kill -9` mid-run: it completes by itself with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from infra.local import supervisor
from infra.local.node import job_path
from tasks.mlflow_client import connect
from tasks.report.figures import figures_of
from tasks.report.gather import gather
from tasks.tracking import METRICS
from tests.conftest import Stack
from tests.flows.runs import (
    PATIENT,
    at_leisure_while,
    flow_processes,
    last_json,
    loss_history,
    mlflow_runs,
    newest_run,
    newest_states,
    processes,
    run_keys,
    wait_for_step,
    worker,
)
from tests.infra.probes import kill_9, service_pid
from tests.waiting import wait_until
from training.runs.record import RunRecord

SHORT = ("--set", "train.steps=240", "--set", "train.checkpoint_every_steps=20")
ONE_NODE = ("--set", "launch.nodes=1")
"""Where it is not the ranks that die."""


@pytest.mark.slow
def test_killed_rank_and_agent_change_nothing(stack: Stack, tmp_path: Path) -> None:
    """Both killed mid-run: the run completes, one MLflow run, one point per step, the bits of a calm run; and a report
    that tells of it."""
    before, slow = run_keys(stack), tmp_path / "slow"
    slow.touch()
    arguments = ("digits", "--json", "--set", "seed=11", *SHORT, *at_leisure_while(slow, after_step=50, num_ranks=2))
    command = stack.start("run", *arguments, *PATIENT)
    run = wait_for_step(stack, before, step=40)
    processes(stack, "training.cluster.worker")[0].kill()
    wait_until(lambda: len(run.read().attempt_starts) > 1, what="the second attempt")
    wait_for_step(stack, before, step=55)
    killed_agent = processes(stack, "training.cluster.agent")[0]
    killed_agent.kill()
    slow.unlink()
    psutil.wait_procs([killed_agent], timeout=120)
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    record = run.read()
    assert record.result is not None
    assert [d.cause for d in record.departures if d.class_name == "Killed"] == ["worker killed by signal 9"]
    assert record.attempt_starts[1] >= 20, "it resumed, it did not begin anew"
    assert record.attempt_starts[-1] >= 40
    assert not killed_agent.is_running()
    (tracked,) = mlflow_runs(stack, run.run_key)
    history = loss_history(stack, tracked.info.run_id)
    assert [step for step, _ in history] == list(range(1, 241))
    assert tracked.data.tags["unbroken.attempts"] == str(len(record.attempt_starts))

    _has_one_report(stack, run, tmp_path, "worker killed by signal 9")
    proof = stack.command("data", "verify-run", run.run_key, "--json")
    assert proof.returncode == 0, proof.stderr
    assert json.loads(proof.stdout)["num_attempts"] == len(record.attempt_starts)
    assert json.loads(proof.stdout)["num_steps"] == 240

    calm = stack.command("train", *arguments, "--fresh", *ONE_NODE)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    assert run.read().departures == ()
    assert last_json(calm.stdout)["state_sha256"] == record.result.state_sha256
    again = next(r for r in mlflow_runs(stack, run.run_key) if r.info.run_id != tracked.info.run_id)
    assert loss_history(stack, again.info.run_id) == history


@pytest.mark.slow
def test_killed_flow_is_resumed_by_itself(stack: Stack, tmp_path: Path) -> None:
    """The engine trains on, and the same flow run re-attaches instead of beginning again."""
    before, slow = run_keys(stack), tmp_path / "slow"
    slow.touch()
    options = (*SHORT, *ONE_NODE, *at_leisure_while(slow, after_step=30))
    command = stack.start("run", "digits", "--json", "--set", "seed=12", *options)
    run = wait_for_step(stack, before, step=20)
    for process in flow_processes(stack):
        process.kill()
    slow.unlink()
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    states = newest_states(stack)
    assert states[-1] == "Completed"
    assert {"Crashed", "AwaitingRetry"} <= set(states), "each once, unless its worker said late that it had crashed"
    record = run.read()
    assert record.departures == ()
    assert len(record.attempt_starts) == 1, "the same ranks trained from beginning to end"
    _is_told_once(stack, run)
    _has_one_report(stack, run, tmp_path, "No node failed or was lost.")


@pytest.mark.slow
def test_worker_flow_and_agents_killed_at_once_are_resumed(stack: Stack, tmp_path: Path) -> None:
    """Nobody is left who could tell of it; and the job is not submitted twice."""
    before, slow = run_keys(stack), tmp_path / "slow"
    slow.touch()
    options = (*SHORT, *ONE_NODE, *at_leisure_while(slow, after_step=50))
    command = stack.start("run", "digits", "--json", "--set", "seed=15", *options)
    run = wait_for_step(stack, before, step=40)
    job = job_path(stack.home, run.run_key)
    submitted_at = job.stat().st_mtime_ns
    victims = [worker(stack), *flow_processes(stack), *processes(stack, "training.cluster.agent")]
    for process in victims:
        process.kill()
    psutil.wait_procs(victims, timeout=120)
    wait_until(lambda: newest_states(stack).count("Running") >= 2, what="the flow run to run again")
    assert not any(process.is_running() for process in victims)
    assert job.stat().st_mtime_ns == submitted_at, "the job was submitted twice"
    slow.unlink()
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    assert newest_states(stack)[-1] == "Completed"
    assert run.read().attempt_starts[-1] >= 20, "it resumed, it did not begin anew"
    wait_until(
        lambda: all(task.state.is_final() for task in _newest_tasks(stack)),
        what="the tasks to be over, those of the dead process too",
    )
    _is_told_once(stack, run)


@pytest.mark.slow
def test_healthy_run_is_not_called_crashed_though_all_around_it_is_killed(stack: Stack) -> None:
    """Its worker, Prefect, MLflow and the reaper at once: the flow process goes on."""
    before = run_keys(stack)
    command = stack.start("run", "digits", "--json", "--set", "seed=16", *SHORT, *ONE_NODE)
    run = wait_for_step(stack, before, step=20)
    killed = {name: service_pid(stack.home, name) for name in ("worker", "prefect", "mlflow", "reaper")}
    for pid in killed.values():
        kill_9(pid)
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    states = newest_states(stack)
    assert (states.count("Crashed"), states.count("Running"), states[-1]) == (0, 1, "Completed")
    assert len(run.read().attempt_starts) == 1
    _is_told_once(stack, run)
    wait_until(lambda: stack.command("status").returncode == 0, what="the stack to be well")


@pytest.mark.soak
def test_mlflow_may_be_away_from_before_the_start_until_after_the_end(stack: Stack) -> None:
    """It stops nothing, and misses nothing: neither a point nor the samples of any node."""
    before = run_keys(stack)
    supervisor.remote(stack.home).stopProcess("mlflow")
    try:
        command = stack.start("train", "digits", "--json", "--set", "seed=18", *SHORT, *PATIENT)
        run = wait_for_step(stack, before, step=40)
        wait_until(lambda: run.read().result, what="the result, without MLflow")
        assert run.read().tracking_run_id is None
    finally:
        supervisor.remote(stack.home).startProcess("mlflow")
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    _is_told_once(stack, run)
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert {"system/node0/cpu_utilization_percentage", "system/node1/cpu_utilization_percentage"} <= set(
        tracked.data.metrics
    )


def _is_told_once(stack: Stack, run: RunRecord) -> None:
    """One MLflow run, finished, with one point per step."""
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "FINISHED"
    client = connect(stack.settings.mlflow_uri)
    for name in METRICS:
        points = client.get_metric_history(tracked.info.run_id, name)
        assert sorted(point.step for point in points) == list(range(1, 241)), name


def _has_one_report(stack: Stack, run: RunRecord, folder: Path, *told: str) -> None:
    """In MLflow, and the same that `unbroken report` makes of the run now; its parts add up to the wall time."""
    (tracked,) = mlflow_runs(stack, run.run_key)
    client = connect(stack.settings.mlflow_uri)
    names = [one.path for one in client.list_artifacts(tracked.info.run_id)]
    assert names.count("report.html") == 1
    kept = Path(client.download_artifacts(tracked.info.run_id, "report.html", str(folder))).read_bytes()
    made = stack.command("report", run.run_key, "--output", str(folder / "made.html"))
    assert made.returncode == 0, made.stdout + made.stderr
    assert (folder / "made.html").read_bytes() == kept
    page = kept.decode()
    assert not [words for words in told if words not in page]
    facts = gather(stack.settings, run)
    assert sum(facts.goodput.seconds.values()) == pytest.approx(facts.wall_seconds, rel=0.01)
    assert figures_of(facts).keys() >= {"loss", "rate", "norm", "throughput", "timeline", "slices", "confusion"}


def _newest_tasks(stack: Stack) -> list[Any]:
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        ours = FlowRunFilter(id=FlowRunFilterId(any_=[newest_run(client).id]))
        return list(client.read_task_runs(flow_run_filter=ours))
