"""Agents of one run on this machine, each a process, before a store whose requests are counted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType

import psutil

from benchmarks.scale.agent import BEAT_SECONDS, BOARD, Board, Row
from benchmarks.scale.counting import CountingProxy
from training.config import DataConfig, LaunchConfig, Preset, TrainConfig
from training.runs.job import Job, agent_environment, store_job
from training.runs.record import RunRecord
from training.s3.objectstore import Store, StoreLocation

BUCKET = "scale"
LOOK_SECONDS = 0.005
LIMIT_SECONDS = 400.0
MANY = 1_000_000
SILENCE_SECONDS = 30.0
"""A machine that all agents share is slower than one of each agent's own: nobody is given up for that."""


class Fleet:
    """`num_nodes` nodes of a run that trains nothing; gone with all their processes when the context is left."""

    def __init__(
        self, num_nodes: int, proxy: CountingProxy, endpoint: str, folder: Path, *, beat_seconds: float
    ) -> None:
        self.num_nodes = num_nodes
        self._folder = folder
        self._board = Board(folder / "board", num_nodes)
        store = Store(StoreLocation(endpoint=endpoint, bucket=BUCKET, prefix=f"{folder.name}/"))
        there = StoreLocation(endpoint=proxy.endpoint, bucket=BUCKET, prefix=f"{folder.name}/")
        self.run = RunRecord(store, "0" * 64)
        self.run.create_if_missing()
        job = Job(
            key=self.run.run_key, generation=0, preset=_preset(num_nodes), dataset_digest="0" * 64, location=there
        )
        self._job = store_job(store, job)
        self._environment = {
            **os.environ,
            **agent_environment(there),
            BOARD: str(folder / "board"),
            BEAT_SECONDS: str(beat_seconds),
        }
        self._agents: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for node in list(self._agents):
            self.kill(node)

    def start(self, node: int) -> None:
        command = [sys.executable, "-m", "benchmarks.scale.agent", str(node), self.run.run_key, self._job]
        with (self._folder / f"node{node}.log").open("a") as log:
            self._agents[node] = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    def kill(self, node: int) -> None:
        agent = self._agents.pop(node)
        agent.kill()
        agent.wait()

    @property
    def rows(self) -> list[Row]:
        """Of all nodes, whether they run or not."""
        return [self._board[node] for node in range(self.num_nodes)]

    def wait_for_group(self, *, after: int, newcomers: Collection[int] = ()) -> tuple[int, float]:
        """Until all that run train under one token later than that. It, and the seconds since the first of the others
        was out of the group before."""
        began, maybe_out = time.monotonic(), None
        while True:
            tokens = {node: self._board[node].token for node in self._agents}
            now = time.monotonic()
            if maybe_out is None and any(found != after for node, found in tokens.items() if node not in newcomers):
                maybe_out = now
            if len(set(tokens.values())) == 1 and min(tokens.values()) > after:
                return min(tokens.values()), now - (maybe_out or now)
            if now - began > LIMIT_SECONDS:
                raise TimeoutError(f"no group after token {after}: {self.run.read().num_nodes} nodes at {tokens}")
            time.sleep(LOOK_SECONDS)

    def cpu_seconds(self) -> list[float]:
        """Of each agent since it began, without its workers."""
        return [sum(process.cpu_times()[:2]) for process in self._processes()]

    def num_descriptors(self) -> int:
        """Of the agent that has the most."""
        return max(process.num_fds() for process in self._processes())

    def memory_bytes(self) -> int:
        """Of its own, of the agent that has the most."""
        return max(process.memory_full_info().uss for process in self._processes())

    def _processes(self) -> Iterable[psutil.Process]:
        return [psutil.Process(agent.pid) for agent in self._agents.values()]


def _preset(num_nodes: int) -> Preset:
    return Preset(
        name="scale",
        recipe="nothing:Nothing",
        data=DataConfig(name="scale", source="nothing.csv", format="csv"),
        train=TrainConfig(steps=MANY, batch_size=1024, virtual_workers=1024),
        launch=LaunchConfig(
            nodes=num_nodes, silence_seconds=SILENCE_SECONDS, join_seconds=LIMIT_SECONDS, max_restarts=MANY
        ),
    )
