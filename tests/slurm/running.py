"""A run on the cluster, whatever it needs to be looked at, and what is done to it."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

from infra.launcher import JobSpec, JobState, Needs
from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from infra.slurm.tasks import Task
from tests.faults.agents import SLOW_WHILE, Agents, prepare
from tests.slurm.cluster import SlurmCluster
from tests.waiting import wait_until
from training.runs.events import Event
from training.runs.history import committed_steps, events_of
from training.runs.job import agent_command, agent_environment
from training.runs.record import Record
from training.s3.objectstore import Store

ROOT = Path(__file__).parents[2]
NUM_NODES = 4
STEPS = 1000
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
            join_seconds=240.0,
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

    def wait_for_group(self, *, num_nodes: int, after: int = 0, without: int | None = None) -> Record:
        """One without that node, if any is named: another may have been lost for a moment before."""
        record = self.agents.wait_for_group(num_nodes=num_nodes, after=after)
        while without in [member.node for member in record.members]:
            record = self.agents.wait_for_group(num_nodes=num_nodes, after=record.token)
        return record

    def wait_for_more_steps(self, number: int) -> None:
        goal = self.last_step() + number
        wait_until(lambda: self.last_step() >= goal, what=f"step {goal}")

    def last_step(self) -> int:
        """Of those told of."""
        steps = (event.step for event in events_of(self.agents.run, self.record()) if event.kind == "step")
        return max(steps, default=0)

    def first_step(self, *, after_token: int = 0) -> Event:
        """That a group of a later token did itself: it also tells again of what the one before had done."""

        def look() -> Event | None:
            found = [event for event in events_of(self.agents.run, self.record()) if event.token > after_token]
            began = next((event.time for event in found if event.kind == "attempt"), None)
            return next((event for event in found if began and event.kind == "step" and event.time > began), None)

        return wait_until(look, what=f"a step after token {after_token}")

    def num_requeued(self) -> dict[str, int]:
        """How often Slurm has requeued each node's job of this run, by the job's name."""
        jobs = [f"{task.job_id}_{task.node}" for task in self.tasks()]
        shown = {job: self.cluster.run("scontrol", "--oneliner", "show", "job", job) for job in jobs}
        return {job: int(text.partition("Restarts=")[2].split()[0]) for job, text in shown.items()}

    def finish(self) -> None:
        self.agents.hurry()
        wait_until(lambda: self.record().result, what="the run's result")
        wait_until(lambda: not self.tasks(), what="the job's end")

    def history(self) -> list[tuple[int, float, str]]:
        found = committed_steps(self.agents.run, self.record())
        return [(event.step, event.values["loss"], event.values["samples"]) for event in found]

    def sources(self) -> list[str]:
        """Where each group got its state from that began when a step had been done."""
        found = list(events_of(self.agents.run, self.record()))
        first = next(event.token for event in found if event.kind == "step")
        return [event.values["source"] for event in found if event.kind == "attempt" and event.token > first]


def kill_and_return(run: Run, *, node: int) -> dict[str, float]:
    """Power off the host that a node is on, and on again: seconds until the others train, and until all do."""
    run.wait_for_more_steps(2)
    before = run.record()
    (host,) = {task.host for task in run.tasks() if task.node == str(node)}
    began = time.time()
    run.cluster.kill_node(host)
    record = run.wait_for_group(num_nodes=NUM_NODES - 1, after=before.token, without=node)
    going = run.first_step(after_token=before.token)
    back = time.time()
    run.cluster.boot_node(host)
    whole = run.wait_for_group(num_nodes=NUM_NODES, after=record.token)
    return {
        "training_again_seconds": round(going.time - began, 2),
        "whole_again_seconds": round(run.first_step(after_token=whole.token - 1).time - back, 2),
    }


def take_and_give_back(low: Run, high: Run) -> dict[str, float]:
    """A more urgent run takes all nodes: seconds until Slurm has started it on each, and until its first step; and what
    the other one lost."""
    low.wait_for_more_steps(2)
    requeued = low.num_requeued()
    began = time.time()
    high.submit()
    wait_until(lambda: {task.state for task in high.tasks()} == {"RUNNING"}, what="Slurm to start all nodes of it")
    started = time.time()
    high.wait_for_group(num_nodes=NUM_NODES)
    wait_until(lambda: {task.state for task in low.tasks()} == {"PENDING"}, what="the other one to wait")
    before, last_step = low.record(), low.last_step()
    high.finish()
    low.wait_for_group(num_nodes=NUM_NODES, after=before.token)
    again = low.num_requeued()
    assert again.keys() == requeued.keys(), "requeued, not submitted again"
    assert all(again[job] > number for job, number in requeued.items())
    return {
        "started_seconds": round(started - began, 2),
        "first_step_seconds": round(high.first_step().time - began, 2),
        "steps_lost": last_step - before.checkpoints[-1].step,
        "nodes_requeued": len(requeued),
    }


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


def medians(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Of each number: the median, and all of them."""
    return {name: {"median": median(row[name] for row in rows), "all": [row[name] for row in rows]} for name in rows[0]}
