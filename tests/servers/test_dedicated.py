"""Servers on nodes of their own: ranks that compute nothing, and have the state of those that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.conftest import Stack
from tests.distributed.ranks import RankPool
from tests.distributed.work import train_digests
from tests.faults.injectors import KillProcess
from tests.flows.runs import at_leisure_while, processes, run_keys, wait_for_step
from tests.servers.dedicated import NUM_STEPS, TRAIN, train_dedicated
from training.errors import UserError
from training.preset_file import load_preset
from training.runs.history import events_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(4, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


@pytest.mark.parametrize("recipe", ["digits", "stdlib"])
def test_the_bits_are_those_of_one_process(ranks: RankPool, recipe: str) -> None:
    """Counters too, which nobody sums: each BatchNorm of `digits` has one."""
    (calm,) = ranks.run(train_digests, 1, recipe, NUM_STEPS, {**TRAIN, "strategy": "all_reduce"})
    for world_size, server_nodes in ((2, 1), (3, 1), (4, 2)):
        found = ranks.run(train_dedicated, world_size, recipe, server_nodes, None)
        num_computing = world_size - server_nodes
        assert {one["state"] for one in found} == {calm["state"]}
        assert [one["history"] for one in found] == [[loss for loss, _ in calm["losses"]]] * world_size
        assert sum(one["computes"] for one in found) == TRAIN["virtual_workers"]
        assert all((one["computes"] > 0) == (rank < num_computing) for rank, one in enumerate(found))
        assert all((one["shards"] > 0) == (rank >= num_computing) for rank, one in enumerate(found))


def test_who_computes_nothing_is_heard_all_the_same(ranks: RankPool) -> None:
    """As when its node is told to leave: all end the group after the same step."""
    for found in ranks.run(train_dedicated, 3, "digits", 1, 2):
        assert found["wishes"] == [False, False, True, True]


@pytest.mark.slow
def test_a_node_of_servers_that_dies_costs_no_step(stack: Stack, tmp_path: Path) -> None:
    """Another node of servers has the backups; the bits are those of a run without any."""
    before, slow = run_keys(stack), tmp_path / "slow"
    slow.touch()
    same = ["digits", *options("seed=91", "train.steps=30", "train.checkpoint_every_steps=2"), *at_leisure_while(slow)]
    apart = ["train.strategy=parameter_server", "launch.nodes=3", "launch.server_nodes=2"]
    apart += ["launch.silence_seconds=60", "launch.join_seconds=240"]  # that this machine is busy is no fault
    command = stack.start("train", *same, *options(*apart))
    run = wait_for_step(stack, before, step=3)
    fault = KillProcess(agent_of(stack, node=2))
    fault.fire()
    assert fault.fired
    slow.unlink()
    output, _ = command.communicate(timeout=240)
    assert command.returncode == 0, output
    record = run.read()
    _, *again = [event for event in events_of(run, record) if event.kind == "attempt"]
    assert again, "the others began anew"
    assert {event.values["source"] for event in again} == {"memory"}
    assert record.result is not None
    calm = stack.command("train", *same, *options("launch.nodes=1"), "--fresh")
    assert calm.returncode == 0, calm.stdout + calm.stderr
    fresh = run.read()
    assert fresh.generation > record.generation
    assert fresh.result is not None
    assert fresh.result.state_sha256 == record.result.state_sha256


def options(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


def agent_of(stack: Stack, *, node: int) -> psutil.Process:
    (found,) = [one for one in processes(stack, "training.cluster.agent") if _follows(one.cmdline(), node)]
    return found


def _follows(command: list[str], node: int) -> bool:
    return command[command.index("training.cluster.agent") + 1] == str(node)


def test_a_preset_that_leaves_nobody_to_compute_is_refused() -> None:
    preset = load_preset("digits", {"train.strategy": "parameter_server", "launch.server_nodes": 1})
    assert preset.launch.server_nodes == 1
    with pytest.raises(UserError, match=r"launch\.server_nodes = 2 must leave one of launch\.nodes = 2"):
        replace(preset.launch, server_nodes=2)
    with pytest.raises(UserError, match=r"launch\.server_nodes needs train\.strategy"):
        load_preset("digits", {"launch.server_nodes": 1})
