"""Training killed at random: ranks, agents, and the servers under them. The bits are those of a calm run."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.faults.injectors import all_kinds
from tests.flows.runs import last_json, loss_history, mlflow_runs, run_keys, wait_for_step
from training.runs.record import RunRecord

STEPS = 240
SHORT = ("--set", f"train.steps={STEPS}", "--set", "train.checkpoint_every_steps=20")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_disturbed_runs(stack: Stack) -> None:
    rows = []
    for seed in range(100, 120):
        row = disturb(stack, seed=seed)
        row["equal_to_calm"] = row["state_sha256"] == calm(stack, seed=seed)
        rows.append(row)
    write_evidence("disturbed-training", rows=rows)
    assert all(row["equal_to_calm"] for row in rows)


def disturb(stack: Stack, *, seed: int) -> dict[str, Any]:
    """One run with three kills at random steps; what became of it."""
    chance = random.Random(seed)
    before = run_keys(stack)
    command = stack.start("train", "digits", "--json", "--set", f"seed={seed}", *SHORT)
    faults = chance.sample(all_kinds(), 3)
    steps = sorted(chance.randrange(20, STEPS - 40) for _ in faults)
    run: RunRecord | None = None
    for fault, step in zip(faults, steps, strict=True):
        run = wait_for_step(stack, before, step=step)
        fault.fire(stack, chance)
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    assert all(fault.fired for fault in faults)
    assert run is not None
    record = run.read()
    assert record.result is not None
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert [step for step, _ in loss_history(stack, tracked.info.run_id)] == list(range(1, STEPS + 1))
    return {
        "seed": seed,
        "killed": {fault.name: fault.num_killed for fault in faults},
        "at_steps": steps,
        "attempts": len(record.attempt_starts),
        "resumed_from": list(record.attempt_starts),
        "state_sha256": record.result.state_sha256,
    }


def calm(stack: Stack, *, seed: int) -> str:
    """The state's digest of the same run, undisturbed."""
    done = stack.command("train", "digits", "--json", "--fresh", "--set", f"seed={seed}", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    digest: str = last_json(done.stdout)["state_sha256"]
    return digest
