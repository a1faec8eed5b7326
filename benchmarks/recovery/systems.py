"""The contestants as an engine sees them: one command per host, started again when it ends, and a log of steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import psutil

from benchmarks.environments import ENVIRONMENTS, ROOT, Contestant, ready_python
from benchmarks.recovery.timeline import Step
from benchmarks.recovery.workload import (
    CHECKPOINT_EVERY_STEPS,
    DETECTION_SECONDS,
    MICROBATCHES,
    SAMPLES_PER_MICROBATCH,
)
from tests.faults.hosts import INTERFACE, Cluster, Host
from training.config import DataConfig, LaunchConfig, Preset, TrainConfig
from training.data.source import open_source
from training.data.writer import write_dataset
from training.recipe import load_recipe
from training.runs.events import EventReader
from training.runs.job import Job, agent_command, agent_environment, store_job
from training.runs.record import RunRecord, run_key
from training.s3.objectstore import Store, StoreLocation

BUCKET = "recovery"
TORCHFT = Contestant("torchft", "torchft", ("torchft==0.2.0", "torch==2.13.0", "numpy"))
RANK_OF_TORCHRUN = "benchmarks.recovery.contestants.torchrun"
RANK_OF_TORCHFT = "benchmarks.recovery.contestants.torchft"
RENDEZVOUS_PORT = 29400
LIGHTHOUSE_PORT = 29510
NUM_RECORDS = 40
MANY = 1_000_000


def min_hosts(hosts: Sequence[Host]) -> int:
    """Training goes on without one of them."""
    return len(hosts) - 1


class System(Protocol):
    """One run of a contestant on a cluster."""

    def start(self, host: Host) -> None:
        """What an engine places on a host."""
        ...

    def steps(self) -> list[Step]:
        """All that were told of so far, by time."""
        ...

    def maybe_rank_on(self, host: Host) -> psutil.Process | None: ...

    def coordinator(self) -> Host | psutil.Process:
        """What the others need to meet: a host, or a process on none of them."""
        ...

    def close(self) -> None: ...


@dataclass
class Logged(ABC):
    """Keeps the processes on each host, and reads the lines that its ranks print."""

    cluster: Cluster
    folder: Path
    num_bytes: int
    _running: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    _offsets: dict[Path, int] = field(default_factory=dict)
    _lines: list[Step] = field(default_factory=list)

    def run(self, host: Host, command: list[str], **env: str) -> None:
        if host.number in self._running:
            host.kill_all()
            self._running.pop(host.number).wait(timeout=30)
        address = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.folder / f"host{host.number}.log").open("a") as log:
            self._running[host.number] = host.start(command, env={**address, **env}, stdout=log, stderr=log)

    def steps(self) -> list[Step]:
        """Each counts from when the first of its ranks had finished it."""
        for path in self.folder.glob("host*.log"):
            with path.open() as log:
                log.seek(self._offsets.get(path, 0))
                for line in iter(log.readline, ""):
                    if not line.endswith("\n"):
                        break
                    self._offsets[path] = log.tell()
                    if line.startswith('{"time"'):
                        self._lines.append(Step(**json.loads(line)))
        self._lines.sort(key=lambda step: step.time)
        first = {(step.group, step.number): step for step in reversed(self._lines)}
        return sorted(first.values(), key=lambda step: step.time)

    def maybe_rank_on(self, host: Host) -> psutil.Process | None:
        """The oldest: those that came later are spares."""
        found = [process for process in host.processes() if self._is_rank(process)]
        return min(found, key=lambda process: process.create_time(), default=None)

    @abstractmethod
    def _is_rank(self, process: psutil.Process) -> bool: ...

    def close(self) -> None:
        for host in self.cluster.hosts:
            host.kill_all()


@dataclass
class Unbroken(Logged):
    """An agent per host."""

    recipe: str = "Sized"
    virtual_workers: int = MICROBATCHES
    balance_seconds: float = LaunchConfig.balance_seconds

    def __post_init__(self) -> None:
        (self.folder / "raw").mkdir()
        (self.folder / "raw" / "numbers.csv").write_text("".join(f"{number}\n" for number in range(NUM_RECORDS)))
        preset = self._preset()
        recipe = load_recipe(preset)
        store = Store(
            StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=BUCKET, prefix=f"{self.folder.name}/")
        )
        source = open_source(preset.data, folder=str(self.folder), location=store.location)
        dataset = write_dataset(store, source, preset.data, recipe).manifest.digest
        key = run_key(recipe=recipe, preset=preset, dataset_digest=dataset)
        self._run = RunRecord(store, key)
        self._run.create_if_missing()
        self._there = StoreLocation(
            endpoint=self.cluster.store_endpoint, bucket=store.location.bucket, prefix=store.location.prefix
        )
        job = Job(key=key, generation=0, preset=preset, dataset_digest=dataset, location=self._there)
        self._job = store_job(store, job)
        self._events = EventReader(store, self._run.prefix(self._run.read()))
        self._begun = 0
        self._num_ranks = 0
        self._numbers: set[int] = set()
        self._steps: list[Step] = []
        self.shares: list[Sequence[int]] = []
        """Of virtual workers, in the order in which they were changed to."""

    def start(self, host: Host) -> None:
        command = [part.replace("{node}", str(host.number)) for part in agent_command(self._run.run_key, self._job)]
        self.run(host, command, **agent_environment(self._there), UNBROKEN_NODE_ADDRESS=host.address)

    def steps(self) -> list[Step]:
        """A group first tells again of steps that the one before may have told nobody of, then that it began."""
        for event in self._events.read_new(newest_token=self._run.read().token):
            if event.kind == "attempt":
                self._begun, self._num_ranks = event.token, event.values["world_size"]
                self._numbers &= set(range(event.values["resumed_from"] + 1))
            if event.kind == "balance":
                self.shares.append(event.values["shares"])
            if event.kind == "step" and event.step not in self._numbers:
                self._numbers.add(event.step)
                group = str(self._begun)
                self._steps.append(Step(time=event.time, number=event.step, num_ranks=self._num_ranks, group=group))
        return self._steps

    def _preset(self) -> Preset:
        return Preset(
            name="sized",
            recipe=f"benchmarks.recovery.contestants.unbroken:{self.recipe}",
            data=DataConfig(name="sized", source="raw", format="csv"),
            train=TrainConfig(
                steps=MANY,
                batch_size=self.virtual_workers * SAMPLES_PER_MICROBATCH,
                virtual_workers=self.virtual_workers,
                checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
            ),
            launch=LaunchConfig(
                nodes=len(self.cluster.hosts),
                min_nodes=min_hosts(self.cluster.hosts),
                join_seconds=60.0,
                silence_seconds=DETECTION_SECONDS,
                hang_seconds=DETECTION_SECONDS,
                max_restarts=MANY,
                keep_spares=True,
                balance_seconds=self.balance_seconds,
            ),
            hyperparameters={"num_bytes": self.num_bytes},
        )

    def coordinator(self) -> Host:
        first = self._run.read().members[0].node
        return self.cluster.hosts[first]

    def _is_rank(self, process: psutil.Process) -> bool:
        return "training.cluster.worker" in process.cmdline()


@dataclass
class Torchrun(Logged):
    """Its agents meet at the first host. The settings are the quickest that it was seen to work with."""

    def start(self, host: Host) -> None:
        hosts = self.cluster.hosts
        config = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3,heartbeat_timeout=2"
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={min_hosts(hosts)}:{len(hosts)}"]
        command += ["--nproc-per-node=1", f"--max-restarts={MANY}", "--monitor-interval=0.05", "--rdzv-id=recovery"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.cluster.hosts[0].address}:{RENDEZVOUS_PORT}"]
        command += [f"--rdzv-conf={config},is_host={int(host.number == 0)}", f"--local-addr={host.address}"]
        command += ["-m", RANK_OF_TORCHRUN, str(self.num_bytes), str(self.folder)]
        self.run(host, command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")

    def coordinator(self) -> Host:
        return self.cluster.hosts[0]

    def _is_rank(self, process: psutil.Process) -> bool:
        return process.name() != "sh" and process.cmdline()[1:4] == ["-u", "-m", RANK_OF_TORCHRUN]


@dataclass
class Torchft(Logged):
    """A replica of one rank per host, and a lighthouse, which is on none of them."""

    def __post_init__(self) -> None:
        python = Path(ready_python(TORCHFT, ENVIRONMENTS))
        self._python = str(python)
        self._lighthouse = self._light(python.with_name("torchft_lighthouse"))

    def _light(self, command: Path) -> psutil.Process:
        options = ["--min_replicas", str(min_hosts(self.cluster.hosts)), "--bind", f"0.0.0.0:{LIGHTHOUSE_PORT}"]
        options += ["--join_timeout_ms", "1000", "--quorum_tick_ms", "20"]
        options += ["--heartbeat_timeout_ms", str(round(DETECTION_SECONDS * 1000))]
        with (self.folder / "lighthouse.log").open("a") as log:
            started = self.cluster.router.namespace.start([str(command), *options], stdout=log, stderr=log)
        return psutil.Process(started.pid)

    def start(self, host: Host) -> None:
        command = [self._python, "-m", RANK_OF_TORCHFT, str(self.num_bytes), host.address]
        self.run(host, command, TORCHFT_LIGHTHOUSE=f"http://{self.cluster.router.address}:{LIGHTHOUSE_PORT}")

    def coordinator(self) -> psutil.Process:
        return self._lighthouse

    def _is_rank(self, process: psutil.Process) -> bool:
        return RANK_OF_TORCHFT in process.cmdline()


SYSTEMS: Mapping[str, Callable[[Cluster, Path, int], System]] = MappingProxyType(
    {"unbroken": Unbroken, "torchrun": Torchrun, "torchft": Torchft}
)
