"""Runs on a real Slurm: nodes die, come back and are taken away for something more urgent, and no bit changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from infra.launcher import JobSpec, JobState, Needs
from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from infra.slurm.tasks import Task
from tests.conftest import Stack
from tests.faults.agents import SLOW_WHILE, Agents, prepare
from tests.slurm.cluster import SlurmCluster
from tests.waiting import wait_until
from training.runs.history import committed_steps, events_of
from training.runs.job import agent_command, agent_environment
from training.runs.record import Record
from training.s3.objectstore import Store

ROOT = Path(__file__).parents[2]
NUM_NODES = 4
STEPS = 400
SITE = {"low": "partition=low", "high": "partition=high"}


class Run:
    """One run of the tiny recipe on the cluster, an agent on each node. It takes its time until it is to hurry."""

    def __init__(self, cluster: SlurmCluster, store: Store, folder: Path, *, priority: str = "low") -> None:
        folder.mkdir()
        self.launcher = SlurmLauncher(folder, store, Site(commands=str(cluster.commands), priorities=SITE))
        self.agents: Agents = prepare(
            store,
            store.location,
            folder,
            num_nodes=NUM_NODES,
            steps=STEPS,
            is_slow=True,
            silence_seconds=2.0,
            join_seconds=60.0,
        )
        self.key = self.agents.run.run_key
        self.cluster = cluster
        self.spec = JobSpec(
            key=self.key,
            num_nodes=NUM_NODES,
            command=agent_command(self.key, self.agents.job_digest),
            environment={
                **agent_environment(store.location),
                SLOW_WHILE: str(folder / "slow"),
                "PYTHONPATH": str(ROOT),
            },
            store=store.location.uri(),
            needs=Needs(num_cpus=4, priority=priority),
        )

    def submit(self) -> None:
        self.launcher.submit(self.spec)

    def tasks(self) -> list[Task]:
        return self.launcher.tasks(self.key)

    def record(self) -> Record:
        return self.agents.run.read()

    def wait_for_group(self, *, num_nodes: int, after: int = 0) -> Record:
        return self.agents.wait_for_group(num_nodes=num_nodes, after=after)

    def wait_for_more_steps(self, number: int) -> None:
        goal = self.num_steps() + number
        wait_until(lambda: self.num_steps() >= goal, what=f"{goal} steps")

    def num_steps(self) -> int:
        return sum(event.kind == "step" for event in events_of(self.agents.run, self.record()))

    def finish(self) -> None:
        self.agents.hurry()
        wait_until(lambda: self.record().result, what="the run's result", timeout_seconds=120)
        wait_until(lambda: not self.tasks(), what="the job's end")

    def history(self) -> list[tuple[int, float, str]]:
        found = committed_steps(self.agents.run, self.record())
        return [(event.step, event.values["loss"], event.values["samples"]) for event in found]

    def sources(self) -> list[str]:
        """Where each group got its state from."""
        found = events_of(self.agents.run, self.record())
        return [event.values["source"] for event in found if event.kind == "attempt"]


@pytest.fixture
def run(cluster: SlurmCluster, store: Store, tmp_path: Path) -> Iterator[Run]:
    started = Run(cluster, store, tmp_path / "run")
    yield started
    started.launcher.cancel(started.key)


@pytest.fixture(scope="module")
def calm(cluster: SlurmCluster, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same, and nothing happens to it."""
    store = Store(replace(stack.location, prefix=f"tests/calm-{os.urandom(4).hex()}/"))
    started = Run(cluster, store, tmp_path_factory.mktemp("calm") / "run")
    started.agents.hurry()
    started.submit()
    wait_until(lambda: started.record().result, what="the calm run's result", timeout_seconds=120)
    wait_until(lambda: not started.tasks(), what="the job's end")
    return started


def require_same(run: Run, calm: Run) -> None:
    run.finish()
    ours, theirs = run.record().result, calm.record().result
    assert ours is not None
    assert theirs is not None
    assert (ours.weights_sha256, ours.state_sha256) == (theirs.weights_sha256, theirs.state_sha256)
    assert run.history() == calm.history()
    status = run.launcher.find(run.key)
    assert status is not None
    assert status.state is JobState.ENDED


@pytest.mark.timeout(300)
def test_each_node_may_die_and_come_back(cluster: SlurmCluster, run: Run, calm: Run) -> None:
    run.submit()
    record = run.wait_for_group(num_nodes=NUM_NODES)
    for victim in (record.members[0].node, record.members[-1].node):
        run.wait_for_more_steps(2)
        (host,) = {task.host for task in run.tasks() if task.node == str(victim)}
        cluster.kill_node(host)
        record = run.wait_for_group(num_nodes=NUM_NODES - 1, after=record.token)
        assert victim not in [member.node for member in record.members]
        cluster.boot_node(host)
        record = run.wait_for_group(num_nodes=NUM_NODES, after=record.token)
    assert len({task.job_id for task in run.tasks()}) == 1, "the same array, requeued by Slurm"
    require_same(run, calm)
    assert run.sources() == ["start"] + ["memory"] * (len(run.sources()) - 1), "no step was done again"


@pytest.mark.timeout(300)
def test_something_more_urgent_takes_the_nodes_and_gives_them_back(
    cluster: SlurmCluster, run: Run, calm: Run, stack: Stack, tmp_path: Path
) -> None:
    run.submit()
    run.wait_for_group(num_nodes=NUM_NODES)
    run.wait_for_more_steps(2)
    corner = Store(replace(stack.location, prefix=f"tests/urgent-{os.urandom(4).hex()}/"))
    urgent = Run(cluster, corner, tmp_path / "urgent", priority="high")
    urgent.submit()
    urgent.wait_for_group(num_nodes=NUM_NODES)
    assert {task.state for task in run.tasks()} == {"PENDING"}
    num_steps = run.num_steps()
    before = run.record()
    assert before.checkpoints[-1].step == num_steps, "the last one to go left all that was done"
    assert {departure.class_name for departure in before.departures} <= {"Preempted"}

    urgent.finish()
    run.wait_for_group(num_nodes=NUM_NODES, after=before.token)
    assert len({task.job_id for task in run.tasks()}) == 1
    require_same(run, calm)
    assert len(run.history()) == STEPS == len({step for step, _, _ in run.history()})
