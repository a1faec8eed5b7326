"""Training on three hosts, seen from outside: commands, what the run's record says, exit codes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Stack
from tests.faults.agents import submit
from tests.faults.hosts import Cluster, Host
from tests.faults.machine import PowerLoss
from tests.waiting import wait_until
from training.objectstore import Store
from training.record import Result


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[Cluster]:
    with Cluster(3, store=stack.location.endpoint) as running:
        yield running


@pytest.fixture(scope="module")
def calm(stack: Stack, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Of the same run in one process."""
    store = Store(replace(stack.location, prefix=f"tests/one-process-{os.urandom(4).hex()}/"))
    agents = submit(store, cluster, tmp_path_factory.mktemp("one"), num_nodes=1)
    agents.start(cluster.hosts[0])
    return agents.result()


@pytest.fixture
def hosts(cluster: Cluster) -> Iterator[Sequence[Host]]:
    yield cluster.hosts
    for host in cluster.hosts:
        host.kill_all()


def test_three_hosts_give_the_bits_of_one_process(
    store: Store, cluster: Cluster, hosts: Sequence[Host], tmp_path: Path, calm: Result
) -> None:
    agents = submit(store, cluster, tmp_path, num_nodes=3)
    for host in hosts:
        agents.start(host)
    wait_until(lambda: all(len(host.processes()) >= 2 for host in hosts), what="an agent and a rank on each host")
    assert agents.result().state_sha256 == calm.state_sha256
    assert agents.run.read().attempt_starts == (0,)


def test_host_that_loses_its_power_and_comes_back_changes_no_bit(
    store: Store, cluster: Cluster, hosts: Sequence[Host], tmp_path: Path, calm: Result
) -> None:
    agents = submit(store, cluster, tmp_path, num_nodes=3)
    for host in hosts:
        agents.start(host)
    wait_until(lambda: agents.run.read().checkpoints, what="a checkpoint")
    with PowerLoss(hosts[0]) as loss:
        assert loss.num_killed >= 2, "the agent and its rank"
        assert agents.run.read().result is None, "it was over before"
        assert agents.running.pop(0).returncode == -9
    agents.start(hosts[0])
    assert agents.result().state_sha256 == calm.state_sha256
    starts = agents.run.read().attempt_starts
    assert len(starts) >= 2
    assert starts[-1] > 0, "it resumed, it did not begin anew"
