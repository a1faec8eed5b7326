"""Agents on the hosts of a cluster: all that they are given is their command, their address and the store's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from tests.faults.hosts import INTERFACE, Cluster, Host
from tests.unit.data_source import data_config, local_source, write_files
from tests.unit.tiny import Tiny, TinyModel, tiny_preset
from tests.waiting import wait_until
from training.config import LaunchConfig, ParallelConfig
from training.data.writer import write_dataset
from training.runs.job import Job, agent_command, agent_environment, store_job
from training.runs.record import Record, Result, RunRecord, run_key
from training.s3.objectstore import Store, StoreLocation

STEPS = 200
EVERY = 20
SLOW_WHILE = "TEST_IS_SLOW_WHILE"
SLOWER_WHILE = "TEST_IS_SLOWER_WHILE"
"""Name the files, in the environment of the agents: one for all, and one for each. They may say for how long."""
NOT_FINITE_WHILE = "TEST_LOSS_IS_NOT_FINITE_WHILE"
PAUSE_SECONDS = 0.15


class Products(nn.Module):
    """What `TinyModel` does last."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.unsqueeze(1) * self.weight).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class Slow(Tiny):
    """Takes its time for as long as a file is there, so that no fault comes too late. It may be cut in two."""

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return self.parts(model)[:2]

    def parts(self, model: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(model, TinyModel)
        return model.norm, model.dropout, Products(model.weight)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        for variable in (SLOW_WHILE, SLOWER_WHILE):
            with contextlib.suppress(FileNotFoundError, KeyError):
                time.sleep(float(Path(os.environ[variable]).read_text() or PAUSE_SECONDS))
        loss = super().loss(model, batch)
        return loss * torch.nan if os.path.exists(os.environ.get(NOT_FINITE_WHILE, "")) else loss


@dataclass
class Agents:
    """One run of the tiny recipe, and an agent of it on each of some hosts."""

    run: RunRecord
    job_digest: str
    location: StoreLocation
    """Of the store, as the hosts reach it."""
    folder: Path
    """Of the logs."""
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    newest: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    """By the number of its host."""

    def hurry(self) -> None:
        """No fault will come any more."""
        (self.folder / "slow").unlink()

    def slower(self, host: Host) -> Path:
        """As long as this is there, that host is slower than the others."""
        return self.folder / f"slower{host.number}"

    def not_finite(self, host: Host) -> Path:
        """As long as this is there, that host's losses are NaN."""
        return self.folder / f"not-finite{host.number}"

    def start(self, host: Host, *, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        command = [
            part.replace("{node}", str(host.number)) for part in agent_command(self.run.run_key, self.job_digest)
        ]
        address = {"UNBROKEN_NODE_ADDRESS": host.address, "GLOO_SOCKET_IFNAME": INTERFACE}
        address[SLOW_WHILE] = str(self.folder / "slow")
        address[SLOWER_WHILE] = str(self.slower(host))
        address[NOT_FINITE_WHILE] = str(self.not_finite(host))
        with (self.folder / f"node{host.number}.log").open("a") as log:
            environment = {**agent_environment(self.location), **address, **(env or {})}
            self.running.append(host.start(command, env=environment, stdout=log, stderr=log))
        self.newest[host.number] = self.running[-1]
        return self.running[-1]

    def is_out_of(self, token: int, host: Host) -> bool:
        """Whether that host's agent has said that its ranks left the group of that token."""
        return f"out of the group of token {token}\n" in (self.folder / f"node{host.number}.log").read_text()

    def restart(self, host: Host) -> None:
        """In the place of one that was killed."""
        before = self.newest[host.number]
        assert before.wait(timeout=120) == -9
        self.running.remove(before)
        self.start(host)

    def wait_for_group(self, *, num_nodes: int, after: int = 0) -> Record:
        """Until a group of so many nodes, of a token after that one, goes on from where the one before stood."""

        def look() -> Record | None:
            record = self.run.read()
            assert record.result is None, "the run was finished before all faults: it needs more steps"
            has_begun = 0 < len(record.resume_steps) == record.token and record.resume_steps[-1] is not None
            return record if has_begun and record.token > after and record.num_nodes == num_nodes else None

        return wait_until(look, what=f"a group of {num_nodes} after token {after}")

    def result(self) -> Result:
        """Once those that run have ended, with success."""
        codes = [agent.wait(timeout=120) for agent in self.running]
        logs = "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))
        assert set(codes) == {0}, logs
        result = self.run.read().result
        assert result is not None, logs
        return result


def find(host: Host, module: str) -> list[psutil.Process]:
    """The processes of a module on a host."""
    return [process for process in host.processes() if module in process.cmdline()]


def submit(store: Store, cluster: Cluster, folder: Path, **options: Any) -> Agents:
    """A run of `prepare` that a cluster's hosts are to do."""
    return prepare(store, replace(store.location, endpoint=cluster.store_endpoint), folder, **options)


def prepare(
    store: Store,
    there: StoreLocation,
    folder: Path,
    *,
    num_nodes: int,
    steps: int = STEPS,
    is_slow: bool = False,
    parallel: ParallelConfig | None = None,
    **launch: Any,
) -> Agents:
    """A run of the tiny recipe, the same each time, in that corner of the store. Logs and source go into `folder`.

    Agents reach the store `there`. One that `is_slow` takes its time until it is told to `hurry`.
    """
    recipe = Slow() if is_slow else Tiny()
    data = data_config()
    write_files(folder, num_files=2)
    dataset = write_dataset(store, local_source(folder, data), data, Tiny()).manifest.digest
    preset = tiny_preset(steps=steps, checkpoint_every_steps=EVERY)
    settings = LaunchConfig(nodes=num_nodes, **{"collective_timeout_seconds": 60, **launch})
    preset = replace(preset, data=data, launch=settings, parallel=parallel or ParallelConfig())
    if is_slow:
        preset = replace(preset, recipe="tests.faults.agents:Slow")
    key = run_key(recipe=recipe, preset=preset, dataset_digest=dataset)
    (folder / "slow").touch()
    run = RunRecord(store, key)
    run.create_if_missing()
    job = Job(key=key, generation=0, preset=preset, dataset_digest=dataset, location=there)
    return Agents(run=run, job_digest=store_job(store, job), location=there, folder=folder)
