"""`kill -9` and cancellation mid-run: it completes by itself with the same bits, or leaves nothing alive."""

from __future__ import annotations

import json
import signal
from typing import Any

from prefect.client.orchestration import get_client

from tests.conftest import Stack
from tests.flows.runs import last_json, loss_history, mlflow_runs, processes, run_keys, wait_for_step
from tests.waiting import wait_until

SHORT = ("--set", "train.steps=240", "--set", "train.checkpoint_every_steps=20")


def test_killed_rank_and_agent_change_nothing(stack: Stack) -> None:
    """Both killed mid-run: the run completes, one MLflow run, one point per step, the bits of a calm run."""
    before = run_keys(stack)
    command = stack.start("run", "digits", "--json", "--set", "seed=11", *SHORT)
    run = wait_for_step(stack, before, step=40)
    processes(stack, "training.worker")[0].kill()
    wait_until(lambda: len(run.read().attempt_starts) > 1, what="the second attempt")
    wait_for_step(stack, before, step=100)
    killed_agent = processes(stack, "training.agent")[0]
    killed_agent.kill()
    output, _ = command.communicate(timeout=120)
    assert command.returncode == 0, output
    record = run.read()
    assert record.result is not None
    assert [d.cause for d in record.departures if d.class_name == "Killed"] == ["worker killed by signal 9"]
    assert record.attempt_starts[1] >= 20, "it resumed, it did not begin anew"
    assert record.attempt_starts[-1] >= 80
    assert not killed_agent.is_running()
    (tracked,) = mlflow_runs(stack, run.run_key)
    history = loss_history(stack, tracked.info.run_id)
    assert [step for step, _ in history] == list(range(1, 241))
    assert tracked.data.tags["unbroken.attempts"] == str(len(record.attempt_starts))

    proof = stack.command("data", "verify-run", run.run_key, "--json")
    assert proof.returncode == 0, proof.stderr
    assert json.loads(proof.stdout)["num_attempts"] == len(record.attempt_starts)
    assert json.loads(proof.stdout)["num_steps"] == 240

    calm = stack.command("train", "digits", "--json", "--fresh", "--set", "seed=11", *SHORT)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    assert run.read().departures == ()
    assert last_json(calm.stdout)["state_sha256"] == record.result.state_sha256
    again = next(r for r in mlflow_runs(stack, run.run_key) if r.info.run_id != tracked.info.run_id)
    assert loss_history(stack, again.info.run_id) == history


def test_killed_flow_leaves_the_training_alone(stack: Stack) -> None:
    """The flow process is killed: the engine trains on, and the next run re-attaches instead of beginning again."""
    before = run_keys(stack)
    arguments = ("run", "digits", "--json", "--set", "seed=12", *SHORT)
    first = stack.start(*arguments)
    run = wait_for_step(stack, before, step=20)
    ranks = {process.pid for process in processes(stack, "training.worker")}
    for process in _flow_processes(stack):
        process.kill()
    first.communicate(timeout=60)
    assert first.returncode == 3, "a flow that was killed is an infrastructure failure"
    second = stack.command(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    record = run.read()
    assert record.departures == ()
    assert len(record.attempt_starts) == 1, "the same ranks trained from beginning to end"
    assert ranks
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert [step for step, _ in loss_history(stack, tracked.info.run_id)] == list(range(1, 241))


def test_cancelling_leaves_no_rank_and_the_next_run_goes_on(stack: Stack) -> None:
    before = run_keys(stack)
    arguments = ("run", "digits", "--set", "seed=13", "--set", "train.steps=100000")
    command = stack.start(*arguments)
    run = wait_for_step(stack, before, step=60)
    assert processes(stack, "training.worker")
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 130, output
    assert not processes(stack, "training.worker")
    assert not processes(stack, "training.agent")
    assert _newest_state(stack) == "Cancelled"
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "KILLED"

    command = stack.start(*arguments)
    resumed = wait_until(lambda: run.read().attempt_starts[1:], what="the next run to resume")
    assert resumed[0] >= 50
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=60)
    assert not processes(stack, "training.worker")


def test_runs_cancel_cancels_whoever_follows(stack: Stack) -> None:
    """And nobody submits it again."""
    before = run_keys(stack)
    command = stack.start("train", "digits", "--set", "seed=14", "--set", "train.steps=100000")
    run = wait_for_step(stack, before, step=60)
    assert stack.command("runs", "cancel", run.run_key).returncode == 0
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 130, output
    assert not processes(stack, "training.agent")
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "KILLED"


def _flow_processes(stack: Stack) -> list[Any]:
    """The processes that execute flow runs: the worker's children."""
    workers = [p for p in processes(stack, "worker") if "start" in p.cmdline()]
    return [child for worker in workers for child in worker.children(recursive=True)]


def _newest_state(stack: Stack) -> str | None:
    with get_client(sync_client=True) as client:
        runs = sorted(client.read_flow_runs(), key=lambda run: str(run.created))
    return runs[-1].state_name
