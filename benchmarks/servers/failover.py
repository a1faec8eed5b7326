"""`python -m benchmarks.servers failover`: from `kill -9` of a process that has a primary to the next step.

Three hosts of their own, each with one rank and servers in it; as many shards, each with a backup on another host. All
of the state is trained, and so lies on servers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.data.store import make_bucket, running_store
from benchmarks.recovery.faults import FAULTS
from benchmarks.recovery.measure import LIMIT_SECONDS, START_SECONDS, wait_for, wait_for_steady
from benchmarks.recovery.systems import BUCKET, System, Unbroken
from benchmarks.recovery.timeline import Recovery, recovery, step_seconds
from benchmarks.recovery.workload import MEGABYTE
from tests.faults.hosts import Cluster, Host
from training.config import Preset

NUM_HOSTS = 3
NUM_REPLICAS = 2


@dataclass
class Served(Unbroken):
    """With as many servers as hosts."""

    def _preset(self) -> Preset:
        preset = super()._preset()
        return replace(
            preset,
            recipe="benchmarks.servers.recipe:Trained",
            train=replace(preset.train, strategy="parameter_server"),
            launch=replace(preset.launch, servers=NUM_HOSTS, server_replicas=NUM_REPLICAS),
        )


def suffer(num_bytes: int, *, num_kills: int, parent: Path) -> Iterator[tuple[float, Recovery]]:
    """The step's seconds before each kill, and what followed."""
    with (
        Cluster(NUM_HOSTS, store=os.environ["AWS_ENDPOINT_URL"]) as cluster,
        TemporaryDirectory(dir=parent) as folder,
        closing(Served(cluster, Path(folder), num_bytes)) as system,
    ):
        for host in cluster.hosts:
            system.start(host)
        for number in range(num_kills):
            wait_for_steady(system, cluster.hosts, START_SECONDS)
            before = step_seconds(system.steps()[-10:])
            yield before, _kill(system, cluster.hosts, number)


def _kill(system: System, hosts: Sequence[Host], number: int) -> Recovery:
    """In turn: who was replaced last has backups alone as yet, and each of the others a primary."""
    fault = FAULTS["worker kill"].make(system, hosts[number % len(hosts)])
    moment = time.time()
    fault.fire()
    assert fault.fired
    return wait_for(lambda: recovery(system.steps(), fault_time=moment), LIMIT_SECONDS)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers failover", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100], help="of state")
    options = parser.parse_args(arguments)
    print("| state | kills | kill to next step, median (min–max) | a step before | steps redone |")
    print("| --- | --- | --- | --- | --- |")
    with TemporaryDirectory(prefix="unbroken-bench-") as folder, running_store(Path(folder) / "store"):
        make_bucket(BUCKET)
        for megabytes in options.megabytes:
            found = list(suffer(megabytes * MEGABYTE, num_kills=options.kills, parent=Path(folder)))
            print(_row(f"{megabytes} MB", found), flush=True)


def _row(title: str, found: Sequence[tuple[float, Recovery]]) -> str:
    seconds = [one.seconds for _, one in found]
    step = statistics.median(before for before, _ in found)
    redone = sum(one.num_redone for _, one in found)
    spread = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"
    return f"| {title} | {len(found)} | {spread} | {step * 1000:.0f} ms | {redone} |"
