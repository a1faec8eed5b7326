"""On a GPU, which one rank has for itself (NCCL) or several share (gloo): the same bits, through kills too.

Passed over where there is none.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import Stack
from tests.faults.injectors import KillProcess
from tests.flows.runs import last_json, processes, run_keys, wait_for_step
from tests.waiting import wait_until
from training.runs.record import Result, RunRecord

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
PRESETS: dict[str, list[str]] = {
    "digits": ["train.steps=120", "train.checkpoint_every_steps=20"],
    "stdlib": ["train.steps=60", "train.checkpoint_every_steps=20", "evaluate.max_samples=64"],
    "stdlib in bfloat16": ["train.steps=40", "train.precision=bfloat16", "evaluate.max_samples=64"],
}


def options(name: str, nodes: int) -> list[str]:
    settings = [*PRESETS[name], f"launch.nodes={nodes}", "seed=77"]
    return [name.partition(" ")[0], *(part for setting in settings for part in ("--set", setting))]


def result_of(run: RunRecord) -> Result:
    found = run.read().result
    assert found is not None
    return found


def trained(stack: Stack, name: str, nodes: int, *more: str) -> tuple[RunRecord, Result]:
    done = stack.command("train", *options(name, nodes), "--json", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunRecord(stack.store, last_json(done.stdout)["run_key"])
    return run, result_of(run)


@pytest.mark.parametrize("name", list(PRESETS))
def test_ranks_that_share_a_gpu_give_the_bits_of_one_that_has_it(stack: Stack, name: str) -> None:
    run, alone = trained(stack, name, 1)
    assert run.read().environment["device"] == torch.cuda.get_device_name()
    for nodes in (2, 4):
        again, shared = trained(stack, name, nodes, "--fresh")
        assert again.run_key == run.run_key
        assert shared.state_sha256 == alone.state_sha256


@pytest.mark.parametrize("nodes", [1, 2])
def test_killed_ranks_change_no_bit(stack: Stack, nodes: int) -> None:
    before = run_keys(stack)
    arguments = [*options("digits", nodes), "--set", "train.steps=2000", "--set", f"seed={100 + nodes}"]
    command = stack.start("train", *arguments, "--json")
    run = wait_for_step(stack, before, step=40)
    fault = KillProcess(processes(stack, "training.cluster.worker")[0])
    fault.fire()
    assert fault.fired
    wait_until(lambda: len(run.read().attempt_starts) > 1, what="another attempt")
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    disturbed = result_of(run)
    done: Any = stack.command("train", *arguments, "--fresh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(run).state_sha256 == disturbed.state_sha256
