"""`python -m benchmarks.recovery.kills`: what is left of a run in which a rank is killed every few seconds."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.data.store import make_bucket, running_store
from benchmarks.recovery.faults import FAULTS
from benchmarks.recovery.measure import running
from benchmarks.recovery.systems import BUCKET, System
from benchmarks.recovery.timeline import Step, recovery, step_seconds
from benchmarks.recovery.workload import MEGABYTE
from tests.faults.hosts import Host

SETTLING_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class SecondsLost:
    """By one kill. `low` and `high` enclose the median in 95 of 100 such runs, whatever the distribution."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Kills:
    """As benchmarks.recovery.calibration reads it, and more."""

    num_nodes: int
    num_bytes: int
    step_seconds: float
    kill_every_seconds: float
    num_kills: int
    seconds_lost: SecondsLost
    goodput: float
    """The share of the wall time that was not lost by kills."""
    wall_time_ratio: float
    """Steps per second, against the same run before the first kill."""
    num_redone: int
    """Steps, in all."""


def suffer(num_bytes: int, *, num_hosts: int, seconds: float, every_seconds: float, seed: int, parent: Path) -> Kills:
    """A third of the time without a kill; then one every `every_seconds`, of a rank by chance."""
    with running("unbroken", num_bytes, num_hosts=num_hosts, parent=parent) as (system, hosts):
        begun = time.time()
        time.sleep(seconds / 3)
        calm_until = time.time()
        killed_at = _kill(system, hosts, round(seconds / every_seconds), every_seconds, random.Random(seed))
        until = time.time()
        time.sleep(SETTLING_SECONDS)  # until all that happened by then has been told
        steps = system.steps()
    calm = [step for step in steps if begun < step.time <= calm_until]
    disturbed = [step for step in steps if calm_until < step.time <= until]
    found = [recovery(steps, fault_time=moment) for moment in killed_at]
    assert all(found), "no kill is survived by nobody"
    lost = sorted(one.lost_seconds for one in found if one)
    return Kills(
        num_nodes=num_hosts,
        num_bytes=num_bytes,
        step_seconds=step_seconds(calm),
        kill_every_seconds=every_seconds,
        num_kills=len(lost),
        seconds_lost=_summary(lost),
        goodput=1 - sum(lost) / (until - calm_until),
        wall_time_ratio=_num_new(disturbed) / (until - calm_until) / (_num_new(calm) / (calm_until - begun)),
        num_redone=sum(one.num_redone for one in found if one),
    )


def _kill(system: System, hosts: Sequence[Host], num_kills: int, every: float, chance: random.Random) -> list[float]:
    begun = time.monotonic()
    moments = []
    for number in range(num_kills):
        time.sleep(max(0.0, begun + number * every - time.monotonic()))
        fault = FAULTS["worker kill"].make(system, chance.choice(hosts))
        moments.append(time.time())
        fault.fire()
        assert fault.fired
    time.sleep(max(0.0, begun + num_kills * every - time.monotonic()))
    return moments


def _num_new(steps: Sequence[Step]) -> int:
    return steps[-1].number - steps[0].number


def _summary(lost: Sequence[float]) -> SecondsLost:
    """Order statistics: their ranks are binomial (David and Nagaraja, Order Statistics, section 7.1)."""
    margin = 1.96 * len(lost) ** 0.5 / 2
    low, high = int(len(lost) / 2 - margin), int(len(lost) / 2 + margin)
    return SecondsLost(median=statistics.median(lost), low=lost[max(0, low)], high=lost[min(len(lost) - 1, high)])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery.kills", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds")
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=100, help="of state")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with TemporaryDirectory(prefix="unbroken-bench-") as folder, running_store(Path(folder) / "store"):
        make_bucket(BUCKET)
        found = suffer(
            options.megabytes * MEGABYTE,
            num_hosts=options.hosts,
            seconds=options.seconds,
            every_seconds=options.every,
            seed=options.seed,
            parent=Path(folder),
        )
    print(json.dumps(asdict(found), indent=2))


if __name__ == "__main__":
    main()
