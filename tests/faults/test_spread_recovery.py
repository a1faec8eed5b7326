"""Two hosts with agents, and a part of the state on each: what is killed is started again by itself, and the bits are
those of one process that had all of the state."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Stack
from tests.faults.agents import EVERY, STEPS, Agents, find, submit
from tests.faults.hosts import Cluster, Host
from tests.faults.injectors import KillProcess
from tests.unit.tiny import exact_arithmetic
from tests.waiting import wait_until
from training.config import ParallelConfig
from training.replay import begin_replay
from training.runs.history import committed_steps, events_of
from training.runs.job import read_job
from training.s3.objectstore import Store

PAUSE_SECONDS = 0.05
"""Of each microbatch, three in a step, until the fault was survived: half a minute in all."""


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[Cluster]:
    with Cluster(2, store=stack.location.endpoint) as running:
        yield running


def history(agents: Agents) -> list[tuple[int, float, str, str]]:
    found = committed_steps(agents.run, agents.run.read())
    return [(event.step, *(event.values[name] for name in ("loss", "samples", "weights"))) for event in found]


def replayed(agents: Agents, store: Store) -> list[tuple[int, float, str, str]]:
    """The last steps, once more, on one rank."""
    job = replace(read_job(store, agents.run.run_key, agents.job_digest), location=store.location)
    with exact_arithmetic():
        _, steps = begin_replay(job, agents.run.read(), first=STEPS - 5)
        return [(step.step, step.loss, step.samples, step.weights) for step in steps]


def attempts(agents: Agents) -> list[tuple[int, str]]:
    """Ranks of each group, and where its state came from."""
    found = [event for event in events_of(agents.run, agents.run.read()) if event.kind == "attempt"]
    return [(event.values["world_size"], event.values["source"]) for event in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "source"),
    [
        (ParallelConfig(shard=2), "checkpoint"),
        (ParallelConfig(shard=2, copy_every_steps=1), "memory"),
        (ParallelConfig(pipeline=2), "checkpoint"),
    ],
    ids=["shards", "copied shards", "stages"],
)
def test_a_rank_that_is_killed_is_started_again_and_all_go_on(
    store: Store,
    stack: Stack,
    cluster: Cluster,
    hosts: Sequence[Host],
    tmp_path: Path,
    parallel: ParallelConfig,
    source: str,
) -> None:
    """From the checkpoint; or, when all that an agent holds is gone with it, from what the other host holds."""
    # whoever stalls is no fault here: groups are counted
    patience = {"min_nodes": 2, "silence_seconds": 60.0, "hang_seconds": 120.0, "join_seconds": 60.0}
    agents = submit(store, cluster, tmp_path / "spread", num_nodes=2, parallel=parallel, is_slow=True, **patience)
    (agents.folder / "slow").write_text(str(PAUSE_SECONDS))
    for host in hosts:
        agents.start(host)
    wait_until(lambda: agents.run.read().checkpoints, what=f"the checkpoint of step {EVERY}")
    token = agents.run.read().token
    is_copied = source == "memory"
    kill = KillProcess(find(hosts[1], f"training.cluster.{'agent' if is_copied else 'worker'}")[0])
    kill.fire()
    assert kill.fired
    if is_copied:
        agents.restart(hosts[1])
    agents.wait_for_group(num_nodes=2, after=token)
    agents.hurry()
    found = agents.result()
    assert attempts(agents) == [(2, "start"), (2, source)]

    elsewhere = Store(replace(stack.location, prefix=f"tests/whole-{os.urandom(4).hex()}/"))
    whole = submit(elsewhere, cluster, tmp_path / "whole", num_nodes=1, is_slow=True)
    whole.hurry()
    whole.start(hosts[0])
    assert whole.run.run_key == agents.run.run_key
    assert whole.result() == replace(found, checkpoint=whole.result().checkpoint)
    assert history(whole) == history(agents)
    done_again = replayed(agents, store)
    assert done_again == history(agents)[-len(done_again) :] != []
