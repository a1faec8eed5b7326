"""Cancelled mid-run, whoever asks and whoever is dead by then: nothing is left alive, and the next run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from infra.local.launcher import LocalLauncher
from tests.conftest import Stack
from tests.flows.runs import (
    PATIENT,
    at_leisure_while,
    flow_processes,
    mlflow_runs,
    newest_states,
    processes,
    run_keys,
    wait_for_step,
    worker,
)
from tests.waiting import wait_until
from training.runs.record import RunRecord

ENDLESS = ("--set", "train.steps=100000", "--set", "train.checkpoint_every_steps=10")
ONE_NODE = ("--set", "launch.nodes=1")
IMPATIENT_REAPER = """
from flows.reaper import decide
decide.QUIET_SECONDS = 2.0
from flows.reaper.__main__ import main
main()
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """Not there yet."""
    return tmp_path / "slow"


@pytest.mark.slow
def test_cancelled_run_leaves_nothing_although_its_worker_and_flow_are_dead(stack: Stack, slow: Path) -> None:
    before = run_keys(stack)
    command = stack.start("run", "digits", "--set", "seed=17", *ENDLESS, *ONE_NODE, *at_leisure_while(slow))
    run = wait_for_step(stack, before, step=20)
    slow.touch()
    wait_until_tracked(run)
    for process in (worker(stack), *flow_processes(stack)):
        process.kill()
    command.send_signal(signal.SIGINT)
    wait_until(lambda: not processes(stack, "training.cluster.agent"), what="every agent to be gone")
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output
    assert newest_states(stack)[-1] == "Cancelled"
    with reaping(stack):
        wait_until_told_killed(stack, run)


@pytest.mark.slow
def test_training_ends_with_the_last_of_its_flow_runs_and_the_next_one_goes_on(stack: Stack, slow: Path) -> None:
    before, launcher = run_keys(stack), LocalLauncher(stack.home)
    arguments = ("run", "digits", "--set", "seed=13", *ENDLESS, *PATIENT, *at_leisure_while(slow))
    first = stack.start(*arguments)
    run = wait_for_step(stack, before, step=60)
    slow.touch()
    wait_until_tracked(run)
    second = stack.start(*arguments)
    wait_until(lambda: len(launcher.jobs()[run.run_key]) == 2, what="the second to ask for it")
    agents = processes(stack, "training.cluster.agent")
    cancel(first)
    before_that = run.read().checkpoints[-1].step
    wait_until(lambda: run.read().checkpoints[-1].step > before_that, what="a checkpoint since")
    assert processes(stack, "training.cluster.agent") == agents != []
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert tracked.info.status == "RUNNING"
    cancel(second)
    wait_until(lambda: not processes(stack, "training.cluster.agent"), what="the agents to be gone")

    num_attempts = len(run.read().attempt_starts)
    next_one = stack.start(*arguments)
    resumed = wait_until(lambda: run.read().attempt_starts[num_attempts:], what="the next run to resume")
    assert resumed[0] >= 50
    wait_until(lambda: processes(stack, "training.cluster.worker"), what="its ranks")
    cancel(next_one)
    assert not processes(stack, "training.cluster.worker")
    assert not processes(stack, "training.cluster.agent")
    assert newest_states(stack)[-1] == "Cancelled"
    wait_until_told_killed(stack, run)


@pytest.mark.slow
def test_runs_cancel_cancels_whoever_follows(stack: Stack, slow: Path) -> None:
    """And nobody submits it again."""
    before = run_keys(stack)
    command = stack.start("train", "digits", "--set", "seed=14", *ENDLESS, *ONE_NODE, *at_leisure_while(slow))
    run = wait_for_step(stack, before, step=20)
    slow.touch()
    wait_until_tracked(run)
    assert stack.command("runs", "cancel", run.run_key).returncode == 0
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output
    assert not processes(stack, "training.cluster.agent")
    wait_until_told_killed(stack, run)


def wait_until_tracked(run: RunRecord) -> None:
    """Its training does not wait for MLflow."""
    wait_until(lambda: run.read().tracking_run_id, what="its MLflow run")


def wait_until_told_killed(stack: Stack, run: RunRecord) -> None:
    """By who followed it or, if that had no time to, by the reaper."""

    def look() -> bool:
        (tracked,) = mlflow_runs(stack, run.run_key)
        return bool(tracked.info.status == "KILLED")

    wait_until(look, what="MLflow to be told")


def cancel(command: subprocess.Popen[str]) -> None:
    """As a person does, with Ctrl-C."""
    command.send_signal(signal.SIGINT)
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 130, output


@contextmanager
def reaping(stack: Stack) -> Iterator[None]:
    """A second reaper, which waits for no sign of life for longer than one look: nobody is left to give one."""
    reaper = subprocess.Popen([sys.executable, "-P", "-c", IMPATIENT_REAPER], env=stack.environment())
    try:
        yield
    finally:
        reaper.kill()
        reaper.wait()
