"""Cancelled mid-run, whoever asks and whoever is dead by then: nothing is left alive, and the next run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from infra.local.launcher import LocalLauncher
from tests.conftest import Stack
from tests.flows.runs import (
    flow_processes,
    mlflow_runs,
    newest_states,
    processes,
    run_keys,
    wait_for_step,
    worker,
)
from tests.waiting import wait_until

ENDLESS = ("--set", "train.steps=100000")
ONE_NODE = ("--set", "launch.nodes=1")
IMPATIENT_REAPER = """
from flows.reaper import decide
decide.QUIET_SECONDS = 2.0
from flows.reaper.__main__ import main
main()
"""


def test_cancelled_run_leaves_nothing_although_its_worker_and_flow_are_dead(stack: Stack) -> None:
    before = run_keys(stack)
    command = stack.start("run", "digits", "--set", "seed=17", *ENDLESS, *ONE_NODE)
    run = wait_for_step(stack, before, step=20)
    for process in (worker(stack), *flow_processes(stack)):
        process.kill()
    command.send_signal(signal.SIGINT)
    wait_until(lambda: not processes(stack, "training.cluster.agent"), what="every agent to be gone")
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output
    assert newest_states(stack)[-1] == "Cancelled"
    with reaping(stack):
        wait_until(lambda: mlflow_runs(stack, run.run_key)[0].info.status == "KILLED", what="MLflow to be told")


def test_cancelling_leaves_no_rank_and_the_next_run_goes_on(stack: Stack) -> None:
    before = run_keys(stack)
    arguments = ("run", "digits", "--set", "seed=13", *ENDLESS)
    command = stack.start(*arguments)
    run = wait_for_step(stack, before, step=60)
    assert processes(stack, "training.cluster.worker")
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output
    assert not processes(stack, "training.cluster.worker")
    assert not processes(stack, "training.cluster.agent")
    assert newest_states(stack)[-1] == "Cancelled"
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "KILLED"

    command = stack.start(*arguments)
    resumed = wait_until(lambda: run.read().attempt_starts[1:], what="the next run to resume")
    assert resumed[0] >= 50
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=240)
    assert not processes(stack, "training.cluster.worker")


def test_training_of_two_flow_runs_ends_with_the_last_one(stack: Stack) -> None:
    before, launcher = run_keys(stack), LocalLauncher(stack.home)
    arguments = ("run", "digits", "--set", "seed=18", *ENDLESS, *ONE_NODE)
    first = stack.start(*arguments)
    run = wait_for_step(stack, before, step=20)
    second = stack.start(*arguments)
    wait_until(lambda: len(launcher.jobs()[run.run_key]) == 2, what="the second to ask for it")
    agents = processes(stack, "training.cluster.agent")

    def cancel(command: subprocess.Popen[str]) -> None:
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=240)
        assert command.returncode == 130, output

    cancel(first)
    before_that = run.read().checkpoints[-1].step
    wait_until(lambda: run.read().checkpoints[-1].step > before_that, what="a checkpoint since")
    assert processes(stack, "training.cluster.agent") == agents != []
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "RUNNING"
    cancel(second)
    wait_until(lambda: not processes(stack, "training.cluster.agent"), what="the agent to be gone")


def test_runs_cancel_cancels_whoever_follows(stack: Stack) -> None:
    """And nobody submits it again."""
    before = run_keys(stack)
    command = stack.start("train", "digits", "--set", "seed=14", *ENDLESS, *ONE_NODE)
    run = wait_for_step(stack, before, step=60)
    assert stack.command("runs", "cancel", run.run_key).returncode == 0
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output
    assert not processes(stack, "training.cluster.agent")
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "KILLED"


@contextmanager
def reaping(stack: Stack) -> Iterator[None]:
    """A second reaper, which waits for no sign of life for longer than one look: nobody is left to give one."""
    reaper = subprocess.Popen([sys.executable, "-P", "-c", IMPATIENT_REAPER], env=stack.environment())
    try:
        yield
    finally:
        reaper.kill()
        reaper.wait()
