"""Runs on a real Slurm: nodes die, come back and are taken away for something more urgent, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.agents import EVERY
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import NUM_NODES, STEPS, Run, kill_and_return, require_same, take_and_give_back
from training.s3.objectstore import Store

TIMES = {"slurmd_timeout_seconds": 5, "grace_seconds": 15}
"""Of the cluster: nodes die here, and somebody waits for that to be noticed."""


@pytest.mark.slow
def test_each_node_may_die_and_come_back(run: Run, calm: Run) -> None:
    run.submit()
    record = run.wait_for_group(num_nodes=NUM_NODES)
    for victim in (record.members[0].node, record.members[-1].node):
        kill_and_return(run, node=victim)
    assert len({task.job_id for task in run.tasks()}) == 1, "the same array, requeued by Slurm"
    require_same(run, calm)
    assert set(run.sources()) == {"memory"}, "no step was done again"


@pytest.mark.slow
def test_something_more_urgent_takes_the_nodes_and_gives_them_back(
    cluster: SlurmCluster, run: Run, calm: Run, corner: Store, tmp_path: Path
) -> None:
    run.submit()
    run.wait_for_group(num_nodes=NUM_NODES)
    urgent = Run(cluster, corner, tmp_path / "urgent", priority="high")
    lost = take_and_give_back(run, urgent)["steps_lost"]
    assert 0 <= lost < EVERY, (
        "the last one to go left a checkpoint, unless it was told while its group of one regrouped"
    )
    require_same(run, calm)
    assert len(run.history()) == STEPS == len({step for step, _, _ in run.history()})
