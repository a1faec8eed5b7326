"""Real processes and real kills: the same bits as one process, and nothing that was acknowledged is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.servers.process import hash_of
from tests.servers.test_arithmetic import adamw, one_process
from tests.waiting import wait_until

NUM_STEPS = 24


class Process:
    """One that was started, and what it said so far."""

    def __init__(self, name: str, **config: Any) -> None:
        self.name, self.config = name, config
        command = [sys.executable, "-m", "tests.servers.process", json.dumps({"name": name, **config})]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: list[dict[str, Any]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.said.append(json.loads(line))

    def tell(self, **order: Any) -> None:
        assert self.popen.stdin is not None
        with suppress(BrokenPipeError):
            self.popen.stdin.write(json.dumps(order) + "\n")
            self.popen.stdin.flush()

    def address(self) -> list[Any]:
        wait_until(lambda: self.said, what=f"{self.name} to listen")
        found: list[Any] = self.said[0]["address"]
        return found

    @property
    def step(self) -> int:
        return max((said["step"] for said in self.said if "step" in said), default=0)

    @property
    def maybe_digest(self) -> str | None:
        return next((said["digest"] for said in reversed(self.said) if "digest" in said), None)


class Cluster:
    """As the run record and the agents do: who is lost is replaced, under the next token."""

    def __init__(self, *, num_shards: int, num_replicas: int, num_workers: int, num_steps: int) -> None:
        self._num_shards, self._num_steps = num_shards, num_steps
        self._numbers = self.token = self._until = 0
        self.replicas = [
            [self._server(shard, is_filled=True) for _ in range(num_replicas)] for shard in range(num_shards)
        ]
        self.workers = [self._worker() for _ in range(num_workers)]

    def _name(self, kind: str) -> str:
        self._numbers += 1
        return f"{kind} {self._numbers}"

    def _server(self, shard: int, *, is_filled: bool) -> Process:
        return Process(
            self._name("server"), role="server", shard=shard, num_shards=self._num_shards, is_filled=is_filled
        )

    def _worker(self) -> Process:
        return Process(self._name("worker"), role="worker", num_shards=self._num_shards, num_steps=self._num_steps)

    def all(self) -> list[Process]:
        return [*(server for servers in self.replicas for server in servers), *self.workers]

    def regroup(self) -> None:
        self.token += 1
        places = {process.name: process.address() for process in self.all()}
        for process in self.all():
            process.tell(
                until=self._until,
                token=self.token,
                places=places,
                replicas=[[server.name for server in servers] for servers in self.replicas],
                workers=[worker.name for worker in self.workers],
            )

    def go_on(self, until: int) -> None:
        """Nobody begins a step after that."""
        self._until = until
        for worker in self.workers:
            worker.tell(until=until)

    def kill(self, victim: Process) -> None:
        """And have another one in its place, last in line."""
        victim.popen.kill()
        assert victim.popen.wait(timeout=120) == -9
        for shard, servers in enumerate(self.replicas):
            if victim in servers:
                servers.remove(victim)
                servers.append(self._server(shard, is_filled=False))
        if victim in self.workers:
            self.workers[self.workers.index(victim)] = self._worker()
        self.regroup()

    def step(self) -> int:
        return max(worker.step for worker in self.workers)

    def close(self) -> None:
        for process in self.all():
            process.popen.kill()
            process.popen.wait(timeout=120)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    running = Cluster(num_shards=2, num_replicas=2, num_workers=2, num_steps=NUM_STEPS)
    yield running
    running.close()


@pytest.mark.slow
def test_servers_and_workers_are_killed_one_after_another(cluster: Cluster) -> None:
    chance = random.Random(1)
    cluster.regroup()
    victims: list[Callable[[], Process]] = [
        lambda: cluster.replicas[0][0],
        lambda: cluster.workers[0],
        lambda: cluster.replicas[1][0],  # of each shard one: nobody waits here until a new one is filled
        lambda: cluster.workers[1],
    ]
    for victim in victims:
        goal = cluster.step() + chance.randrange(1, 4)
        cluster.go_on(goal + 1)  # it dies in that one, or at its end
        wait_until(lambda goal=goal: cluster.step() >= goal, what=f"step {goal}")  # type: ignore[misc]
        cluster.kill(victim())
    cluster.go_on(NUM_STEPS)
    wait_until(lambda: all(worker.maybe_digest for worker in cluster.workers), what="the end")
    expected = hash_of(one_process(adamw, num_steps=NUM_STEPS))
    assert {worker.maybe_digest for worker in cluster.workers} == {expected}
    assert cluster.step() == NUM_STEPS
