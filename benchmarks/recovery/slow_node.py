"""`python -m benchmarks.recovery.slow_node`: what a slow node leaves of a group's speed, with shares of virtual workers
that follow the nodes' speed, and without."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.data.store import make_bucket, running_store
from benchmarks.recovery.contestants.unbroken import PACE_FILE
from benchmarks.recovery.measure import wait_for_steady
from benchmarks.recovery.systems import BUCKET, System, Unbroken
from benchmarks.recovery.workload import MEGABYTE
from tests.faults.hosts import Cluster, Host
from training.config import LaunchConfig

NUM_HOSTS = 2
VIRTUAL_WORKERS = 12
PACE_SECONDS = 0.04
"""Of a virtual worker, asleep: the hosts have the processors of one machine in common, and would not be slow alone."""
START_SECONDS = 120.0
SETTLING_SECONDS = 15.0
"""For shares to follow; others wait as long."""
FLUSH_SECONDS = 3.0
"""Until all that happened has been told."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Steps per second of one run: before one of its nodes became slow, and then."""

    is_balanced: bool
    calm: float
    slowed: float
    shares: Sequence[Sequence[int]]


class PacedHosts(Unbroken):
    """A host takes `set_pace` seconds for a virtual worker."""

    def run(self, host: Host, command: list[str], **env: str) -> None:
        self.set_pace(host, PACE_SECONDS)
        super().run(host, command, **env, **{PACE_FILE: str(self._file(host))})

    def set_pace(self, host: Host, seconds: float) -> None:
        new = self._file(host).with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._file(host))

    def _file(self, host: Host) -> Path:
        return self.folder / f"pace{host.number}"


def measure(*, is_balanced: bool, slowdown: float, seconds: float, parent: Path) -> Speeds:
    balance_seconds = LaunchConfig.balance_seconds if is_balanced else 0.0
    with (
        Cluster(NUM_HOSTS, store=os.environ["AWS_ENDPOINT_URL"]) as cluster,
        TemporaryDirectory(dir=parent) as folder,
        closing(
            PacedHosts(
                cluster,
                Path(folder),
                MEGABYTE,
                recipe="Paced",
                virtual_workers=VIRTUAL_WORKERS,
                balance_seconds=balance_seconds,
            )
        ) as system,
    ):
        for host in cluster.hosts:
            system.start(host)
        wait_for_steady(system, cluster.hosts, START_SECONDS)
        calm = _steps_per_second(system, seconds)
        system.set_pace(cluster.hosts[1], slowdown * PACE_SECONDS)
        time.sleep(SETTLING_SECONDS)
        slowed = _steps_per_second(system, seconds)
        return Speeds(is_balanced=is_balanced, calm=calm, slowed=slowed, shares=system.shares)


def _steps_per_second(system: System, seconds: float) -> float:
    begun = time.time()
    time.sleep(seconds)
    ended = time.time()
    time.sleep(FLUSH_SECONDS)
    return sum(begun < step.time <= ended for step in system.steps()) / (ended - begun)


def as_markdown(found: Sequence[Speeds]) -> str:
    """Median (min–max) over the rounds, each of which has one run of both kinds."""
    balanced = [speeds for speeds in found if speeds.is_balanced]
    even = [speeds for speeds in found if not speeds.is_balanced]
    rows = {
        "steps per second with a slow node, balanced of not balanced": [
            one.slowed / other.slowed for one, other in zip(balanced, even, strict=True)
        ],
        "steps per second with a slow node, of those before, balanced": [one.slowed / one.calm for one in balanced],
        "likewise, not balanced": [one.slowed / one.calm for one in even],
        "steps per second before, balanced of not balanced": [
            one.calm / other.calm for one, other in zip(balanced, even, strict=True)
        ],
    }
    return "\n".join(
        ["| ratio | median (min–max) |", "| --- | --- |"]
        + [f"| {name} | {statistics.median(r):.2f} ({min(r):.2f}–{max(r):.2f}) |" for name, r in rows.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.slow_node", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slowdown", type=float, default=3.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--json", type=Path, help="where to write every single result")
    options = parser.parse_args()
    found: list[Speeds] = []
    with TemporaryDirectory(prefix="unbroken-bench-") as folder, running_store(Path(folder) / "store"):
        make_bucket(BUCKET)
        for number in range(options.rounds):
            for is_balanced in ((True, False), (False, True))[number % 2]:
                speeds = measure(
                    is_balanced=is_balanced,
                    slowdown=options.slowdown,
                    seconds=options.seconds,
                    parent=Path(folder),
                )
                print(speeds, file=sys.stderr, flush=True)
                found.append(speeds)
                if options.json:
                    options.json.write_text(json.dumps([asdict(speeds) for speeds in found]))
    print(as_markdown(found))


if __name__ == "__main__":
    main()
