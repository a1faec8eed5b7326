"""What docs/slurm.md says that it takes when nodes die or are wanted elsewhere, five times each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import NUM_NODES, Run, kill_and_return, medians, require_same, take_and_give_back
from training.s3.objectstore import Store

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
NUM_TIMES = 5
TIMES = {"slurmd_timeout_seconds": 5, "grace_seconds": 15}
SETTINGS = {"SlurmdTimeout": 5, "cred_expire": 5, "GraceTime": 15, "KillWait": 5, "silence_seconds": 2.0}
"""Of the cluster (cluster.py) and the runs (running.py)."""


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Written down at the end, if every soak of this file passed."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == 2:
        write_evidence("slurm-nodes", rows=sorted(found, key=lambda row: str(row["case"])))


def test_nodes_die_and_come_back(run: Run, calm: Run, rows: list[dict[str, Any]]) -> None:
    run.submit()
    run.wait_for_group(num_nodes=NUM_NODES)
    nodes = [number % NUM_NODES for number in range(NUM_TIMES)]
    times = [kill_and_return(run, node=node) for node in nodes]
    require_same(run, calm)
    assert set(run.sources()) == {"memory"}, "no step was done again"
    rows.append({"case": "node killed, and back", "nodes": nodes, **medians(times), "same_bits": True, **SETTINGS})


def test_more_urgent_runs(
    cluster: SlurmCluster, run: Run, calm: Run, stack: Stack, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    run.submit()
    run.wait_for_group(num_nodes=NUM_NODES)
    times = []
    for number in range(NUM_TIMES):
        corner = Store(replace(stack.location, prefix=f"tests/urgent-{os.urandom(4).hex()}/"))
        times.append(take_and_give_back(run, Run(cluster, corner, tmp_path / f"urgent{number}", priority="high")))
    require_same(run, calm)
    assert all(row["steps_lost"] == 0 for row in times)
    rows.append({"case": "preempted by a more urgent run", **medians(times), "same_bits": True, **SETTINGS})
