"""A hundred faults, one after another, on four hosts: nothing is lost, nothing done twice, nothing left behind."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import Stack
from tests.faults.agents import Agents, find, submit
from tests.faults.evidence import write_evidence
from tests.faults.hosts import Cluster, Host
from tests.faults.injectors import KillProcess, Lasting, Stop
from tests.faults.machine import PowerLoss
from tests.faults.network import Cut, SlowNetwork, StoreTrouble
from tests.faults.relay import Trouble
from tests.waiting import wait_until
from training.data.audit import verify_run
from training.runs.goodput import account
from training.runs.history import committed_steps, events_of
from training.s3.objectstore import Store

NUM_HOSTS = 4
STEPS = 3000
"""More than are done before the last fault."""


@pytest.fixture(scope="module")
def cluster(stack: Stack) -> Iterator[Cluster]:
    with Cluster(NUM_HOSTS, store=stack.location.endpoint) as running:
        yield running


def begin(store: Store, cluster: Cluster, folder: Path, *, num_nodes: int = NUM_HOSTS) -> Agents:
    folder.mkdir(exist_ok=True)
    timing = {"silence_seconds": 2.0, "hang_seconds": 2.0, "join_seconds": 60.0}
    return submit(store, cluster, folder, num_nodes=num_nodes, steps=STEPS, is_slow=True, **timing)


@dataclass
class Storm:
    """Strikes one host after another, and waits until all train together again."""

    agents: Agents
    cluster: Cluster
    chance: random.Random

    def strike(self) -> str:
        """Returns the name of the fault."""
        host = self.chance.choice(self.cluster.hosts)
        name, fault = self.chance.choice(list(self._faults().items()))
        token = self.agents.run.read().token
        fault(host, token)
        self.agents.wait_for_group(num_nodes=NUM_HOSTS)
        return name

    def _faults(self) -> dict[str, Callable[[Host, int], None]]:
        return {
            "kill rank": self._kill_rank,
            "stop rank": lambda host, token: self._last(
                Stop(find(host, "training.cluster.worker")), token, heals=False
            ),
            "kill agent": self._kill_agent,
            "stop agent": lambda host, token: self._last(Stop(find(host, "training.cluster.agent")), token),
            "lose power": self._lose_power,
            "cut off": lambda host, token: self._last(Cut(host), token),
            "slow network": self._slow_network,
            "store away": self._store_away,
        }

    def _kill_rank(self, host: Host, token: int) -> None:
        self._kill(find(host, "training.cluster.worker"))
        self.agents.wait_for_group(num_nodes=NUM_HOSTS, after=token)

    def _kill_agent(self, host: Host, token: int) -> None:
        self._kill(find(host, "training.cluster.agent"))
        self.agents.wait_for_group(num_nodes=NUM_HOSTS - 1, after=token)
        self.agents.restart(host)

    def _kill(self, victims: Sequence[psutil.Process]) -> None:
        fault = KillProcess(victims[0])
        fault.fire()
        assert fault.fired

    def _lose_power(self, host: Host, token: int) -> None:
        with PowerLoss(host) as fault:
            self.agents.wait_for_group(num_nodes=NUM_HOSTS - 1, after=token)
        assert fault.fired
        self.agents.restart(host)

    def _last(self, fault: Lasting, token: int, *, heals: bool = True) -> None:
        """Until the others go on without the host, or its agent has put another rank in the place of the one struck."""
        with fault:
            self.agents.wait_for_group(num_nodes=NUM_HOSTS - 1 if heals else NUM_HOSTS, after=token)
            assert fault.fired

    def _slow_network(self, host: Host, token: int) -> None:
        with SlowNetwork(host, bytes_per_second=10_000) as fault:
            wait_until(lambda: fault.fired, what="packets to be held back")

    def _store_away(self, host: Host, token: int) -> None:
        assert self.cluster.store is not None
        with StoreTrouble(self.cluster.store, Trouble.ANSWERED_503) as fault:
            wait_until(lambda: fault.num_struck > 3, what="the store to be missed")
        assert self.agents.run.read().token == token, "nobody was stopped by that alone"


def history(agents: Agents) -> list[tuple[int, float, str]]:
    found = committed_steps(agents.run, agents.run.read())
    return [(event.step, event.values["loss"], event.values["samples"]) for event in found]


def survive(
    store: Store, cluster: Cluster, folder: Path, *, seed: int, num_faults: int, calm: Agents
) -> dict[str, Any]:
    agents = begin(store, cluster, folder)
    with ExitStack() as stack:
        for host in cluster.hosts:
            stack.callback(host.kill_all)
            agents.start(host)
        agents.wait_for_group(num_nodes=NUM_HOSTS)
        began = time.monotonic()
        storm = Storm(agents, cluster, random.Random(seed))
        names = [storm.strike() for _ in range(num_faults)]
        agents.hurry()
        result = agents.result()
        wall_seconds = time.monotonic() - began
        assert [process for host in cluster.hosts for process in host.processes()] == []
    record = agents.run.read()
    verify_run(store, agents.run.run_key)
    booked = account(events_of(agents.run, record), record.resume_steps)
    return {
        "seed": seed,
        "faults": {name: names.count(name) for name in sorted(set(names))},
        "num_groups": record.token,
        "same_state": result.state_sha256 == calm.result().state_sha256,
        "same_history": history(agents) == history(calm),
        "wall_seconds": round(wall_seconds, 1),
        "booked_seconds": {use: round(seconds, 1) for use, seconds in booked.seconds.items()},
        "booked_of_wall": round(booked.wall_seconds / wall_seconds, 4),
    }


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_a_hundred_random_faults(stack: Stack, store: Store, cluster: Cluster, tmp_path: Path) -> None:
    calm = begin(store, cluster, tmp_path / "calm", num_nodes=1)
    calm.hurry()
    calm.start(cluster.hosts[0])
    calm.result()
    rows = []
    for seed in (1, 2, 3):
        corner = Store(replace(stack.location, prefix=f"tests/storm-{os.urandom(4).hex()}/"))
        num_faults = int(os.environ.get("NUM_FAULTS", "100"))
        rows.append(survive(corner, cluster, tmp_path / str(seed), seed=seed, num_faults=num_faults, calm=calm))
        assert rows[-1]["same_state"]
        assert rows[-1]["same_history"]
        assert abs(rows[-1]["booked_of_wall"] - 1) < 0.01, "the split of the time adds up to that of another clock"
    write_evidence("random-faults", rows=rows)
