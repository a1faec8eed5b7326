"""Training that loses everything at once, again and again, and goes on with another number of ranks each time."""

from __future__ import annotations

import contextlib
import random
import subprocess
from typing import Any

import psutil
import pytest

from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.flows.runs import last_json, loss_history, processes, run_keys, wait_for_step
from training.record import RunRecord

STEPS = 600
LAST_STOP = 200  # what is seen of a run lags behind it: so that no run is over before it is stopped
MAX_RANKS = 4
SHORT = ("--steps", str(STEPS), "--set", "train.checkpoint_every_steps=10")


def start(stack: Stack, *, seed: int, num_ranks: int) -> subprocess.Popen[str]:
    return stack.start("train", "digits", "--json", "--ranks", str(num_ranks), "--set", f"seed={seed}", *SHORT)


def kill_all(stack: Stack, command: subprocess.Popen[str]) -> int:
    """The command, the agents and the ranks, with `kill -9`. Returns how many ranks died."""
    ranks = processes(stack, "training.worker")
    for process in (*processes(stack, "training.agent"), *ranks, psutil.Process(command.pid)):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    command.communicate(timeout=60)
    psutil.wait_procs(ranks, timeout=60)
    return len(ranks)


def history(stack: Stack, run: RunRecord) -> list[tuple[int, float]]:
    tracked = run.read().tracking_run_id
    assert tracked is not None
    return loss_history(stack, tracked)


def elastic(stack: Stack, *, seed: int, num_stops: int) -> dict[str, Any]:
    """A run stopped at random steps, each time gone on with another number of ranks; beside a calm one on one rank."""
    chance = random.Random(seed)
    before = run_keys(stack)
    num_ranks = [chance.randint(1, MAX_RANKS) for _ in range(num_stops + 1)]
    stops = sorted(chance.sample(range(10, LAST_STOP), num_stops))
    killed = []
    for count, stop in zip(num_ranks, stops, strict=False):
        command = start(stack, seed=seed, num_ranks=count)
        run = wait_for_step(stack, before, step=stop)
        killed.append(kill_all(stack, command))
        assert stack.command("runs", "cancel", run.run_key).returncode == 0
    output, _ = start(stack, seed=seed, num_ranks=num_ranks[-1]).communicate(timeout=200)
    result = last_json(output)
    losses = history(stack, run)
    calm, _ = stack.start(
        "train", "digits", "--json", "--fresh", "--ranks", "1", "--set", f"seed={seed}", *SHORT
    ).communicate(timeout=200)
    assert all(killed), "every stop found ranks to kill"
    assert len(losses) == STEPS
    return {
        "seed": seed,
        "num_ranks": num_ranks,
        "killed_at_or_after": stops,
        "num_killed": killed,
        "state_sha256": result["state_sha256"],
        "same_state": result["state_sha256"] == last_json(calm)["state_sha256"],
        "same_loss_history": losses == history(stack, run),
    }


def test_a_run_goes_on_with_another_number_of_ranks(stack: Stack) -> None:
    row = elastic(stack, seed=7, num_stops=1)
    assert row["same_state"]
    assert row["same_loss_history"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_stops_on_any_number_of_ranks(stack: Stack) -> None:
    rows = [elastic(stack, seed=seed, num_stops=2) for seed in range(200, 210)]
    write_evidence("elastic-training", rows=rows)
    assert all(row["same_state"] and row["same_loss_history"] for row in rows)
