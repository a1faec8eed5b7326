"""Training under torchrun, with a killed rank; found by `unbroken train`, and gone on with by a run of more steps."""

from __future__ import annotations

import json
import signal
import subprocess
import sysconfig
from pathlib import Path

import psutil
import pytest

from tests.conftest import Stack
from tests.flows.runs import at_leisure_while, last_json, loss_history, run_keys, wait_for_step

TORCHRUN = str(Path(sysconfig.get_path("scripts")) / "torchrun")
LEVEL = ("--set", "hyperparameters.schedule=constant", "--set", "train.checkpoint_every_steps=20", "--set", "seed=77")


def start_torchrun(stack: Stack, *values: str, num_steps: int, num_ranks: int) -> subprocess.Popen[str]:
    command = [TORCHRUN, "--nproc-per-node", str(num_ranks), "--max-restarts", "3", "-m", "training.main", "digits"]
    store = f"s3://{stack.settings.s3_bucket}/{stack.settings.s3_prefix}"
    return subprocess.Popen(
        [*command, "--store", store, "--set", f"train.steps={num_steps}", *values],
        env=stack.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_one_rank(launcher: psutil.Process) -> None:
    ranks = [child for child in launcher.children(recursive=True) if "training.main" in child.cmdline()]
    ranks[-1].send_signal(signal.SIGKILL)
    psutil.wait_procs(ranks[-1:], timeout=120)


@pytest.mark.slow
def test_other_launchers_and_more_steps(stack: Stack, tmp_path: Path, python: str) -> None:
    sharded = stack.execute([python, "-m", "tasks", "shard", "--preset", "digits", "--out", str(tmp_path)])
    assert sharded.returncode == 0, sharded.stderr
    before, slow = run_keys(stack), tmp_path / "slow"
    slow.touch()
    values = (*LEVEL, *at_leisure_while(slow, after_step=35, num_ranks=2))
    launched = start_torchrun(stack, *values, num_steps=250, num_ranks=2)
    run = wait_for_step(stack, before, step=25)
    kill_one_rank(psutil.Process(launched.pid))
    slow.unlink()
    output, _ = launched.communicate(timeout=240)
    assert launched.returncode == 0, output
    record = run.read()
    assert record.result is not None
    assert record.result.state_sha256 in output
    assert len(record.attempt_starts) == 2
    assert record.attempt_starts[1] >= 20, "it resumed, it did not begin anew"

    found = stack.command("train", "digits", "--json", "--steps", "250", *values)
    assert last_json(found.stdout)["state_sha256"] == record.result.state_sha256
    assert len(run.read().attempt_starts) == 2, "it was found, not trained again"

    longer = stack.command("train", "digits", "--json", "--resume", "--steps", "290", *values)
    assert longer.returncode == 0, longer.stderr
    key = last_json(longer.stdout)["run_key"]
    (after,) = [k for k in run_keys(stack) - before if k != run.run_key]
    assert key == after
    continued = type(run)(stack.store, key).read()
    assert continued.attempt_starts == (0, 250)
    assert continued.tracking_run_id is not None
    assert [step for step, _ in loss_history(stack, continued.tracking_run_id)] == list(range(1, 291))
    proof = stack.command("data", "verify-run", key, "--json")
    assert json.loads(proof.stdout)["num_steps"] == 290
