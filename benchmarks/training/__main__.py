"""`python -m benchmarks.training`: the step rate of each contestant, as a ratio to the hand-written DDP loop's."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import ENVIRONMENTS, ROOT, Contestant, ready_python
from benchmarks.training.workload import WIDTHS
from tests.faults.hosts import INTERFACE, Cluster

TORCH = "torch==2.13.0"
DDP = Contestant("ddp", "DDP, same microbatches")
CONTESTANTS = {
    "ddp microbatches": DDP,
    "ddp one-batch": Contestant("ddp", "DDP, one batch per rank"),
    "unbroken exact": Contestant("unbroken", "**Unbroken**, exact"),
    "unbroken fast": Contestant("unbroken", "**Unbroken**, fast"),
    "unbroken servers-1": Contestant("unbroken", "**Unbroken**, parameter servers"),
    "unbroken servers-2": Contestant("unbroken", "**Unbroken**, parameter servers with a backup each"),
    "unbroken servers-1-8": Contestant("unbroken", "**Unbroken**, eight shards"),
    "unbroken servers-2-8": Contestant("unbroken", "**Unbroken**, eight shards with a backup each"),
    "fabric": Contestant("fabric", "Lightning Fabric", ("lightning==2.6.6", TORCH, "numpy")),
    "lightning_trainer": Contestant("lightning_trainer", "Lightning Trainer", ("lightning==2.6.6", TORCH, "numpy")),
    "accelerate": Contestant("accelerate", "Accelerate", ("accelerate==1.15.0", TORCH, "numpy")),
}
BASE = "ddp microbatches"
WORLD_SIZES = (1, 2, 4)
TARGET_SECONDS = 1.0
NUM_WARM_UP_STEPS = 3
LOOPBACK = "127.0.0.1"
BYTES_PER_MEGABIT = 125_000


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, but for who does it."""

    size: str
    world_size: int

    @property
    def title(self) -> str:
        return f"{self.size} parameters, {self.world_size} rank{'s' * (self.world_size > 1)}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank runs."""

    start: Callable[..., subprocess.Popen[str]] = subprocess.Popen
    address: str = LOOPBACK
    interface: str = "lo"


@contextmanager
def places_of(case: Case, maybe_megabits: int | None) -> Iterator[Sequence[Place]]:
    """On this machine, or each on a host of its own, whose cable carries so many megabits per second each way."""
    if maybe_megabits is None:
        yield [Place()] * case.world_size
        return
    with Cluster(case.world_size, bandwidth=maybe_megabits * BYTES_PER_MEGABIT) as cluster:
        yield [Place(start=host.start, address=host.address, interface=INTERFACE) for host in cluster.hosts]


class Group:
    """The ranks of one contestant, which wait until they are told to step."""

    def __init__(self, name: str, python: str, case: Case, log: Path, places: Sequence[Place]) -> None:
        module, _, argument = name.partition(" ")
        command = [python, "-m", f"benchmarks.training.contestants.{module}", case.size, argument]
        address = {
            "MASTER_ADDR": places[0].address,
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(case.world_size),
        }
        self._folder = tempfile.TemporaryDirectory(prefix="unbroken-bench-")
        address["RENDEZVOUS"] = str(Path(self._folder.name) / "rendezvous")
        with log.open("a") as errors:
            self._ranks = [
                place.start(
                    command,
                    cwd=str(ROOT),
                    env={
                        **os.environ,
                        **address,
                        **dict.fromkeys(("RANK", "NODE_RANK", "GROUP_RANK"), str(rank)),
                        "LOCAL_RANK": "0",
                        "OMP_NUM_THREADS": "1",
                        "ADDRESS": place.address,
                        "GLOO_SOCKET_IFNAME": place.interface,
                        "PYTHONPATH": str(ROOT),
                    },
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
                for rank, place in enumerate(places)
            ]

    def seconds(self, num_steps: int) -> float:
        """How long so many steps took, of the slowest rank."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{num_steps}\n")
            rank.stdin.flush()
        return max(float(json.loads(rank.stdout.readline())) for rank in self._ranks if rank.stdout is not None)

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
        self._folder.cleanup()


@contextmanager
def groups_of(case: Case, pythons: dict[str, str], log: Path, places: Sequence[Place]) -> Iterator[dict[str, Group]]:
    groups = {name: Group(name, python, case, log, places) for name, python in pythons.items()}
    try:
        yield groups
    finally:
        for group in groups.values():
            group.stop()


def measure(case: Case, groups: dict[str, Group], num_rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each round: everybody in turn, in an order that rotates."""
    for group in groups.values():
        group.seconds(NUM_WARM_UP_STEPS)
    num_steps = max(1, round(TARGET_SECONDS / (groups[BASE].seconds(2) / 2)))
    found: dict[str, list[float]] = {name: [] for name in groups}
    for number in range(num_rounds):
        names = list(groups)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            found[name].append(groups[name].seconds(num_steps) / num_steps)
        print(f"{case.title}  round {number + 1}/{num_rounds}", file=sys.stderr)
    return found


def as_markdown(results: dict[Case, dict[str, list[float]]], names: Sequence[str]) -> str:
    """Step rate over that of the base in the same round: median (min–max)."""
    lines = [
        "| step rate / DDP's, median (min–max) | " + " | ".join(CONTESTANTS[n].title for n in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for case, found in results.items():
        cells = []
        for name in names:
            ratios = [base / mine for base, mine in zip(found[BASE], found[name], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        base = statistics.median(found[BASE]) * 1000
        lines.append(f"| {case.title} ({base:.0f} ms) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), help="some of the contestants")
    parser.add_argument("--sizes", nargs="+", default=list(WIDTHS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(WORLD_SIZES))
    parser.add_argument("--megabits", type=int, help="per second, between ranks on hosts of their own; as root")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where peers are installed")
    parser.add_argument("--out", type=Path, default=ENVIRONMENTS / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONTESTANTS if name in {BASE, *arguments.only}]
    pythons = {name: ready_python(CONTESTANTS[name], arguments.environments) for name in names}
    results: dict[Case, dict[str, list[float]]] = {}
    for case in (Case(size=size, world_size=ranks) for size in arguments.sizes for ranks in arguments.ranks):
        with (
            places_of(case, arguments.megabits) as places,
            groups_of(case, pythons, arguments.out / "training.log", places) as groups,
        ):
            results[case] = measure(case, groups, arguments.rounds)
    about = {"rounds": arguments.rounds, "cpus": os.cpu_count(), "os": platform.platform()}
    document = {**about, "seconds_per_step": {case.title: found for case, found in results.items()}}
    (arguments.out / "training.json").write_text(json.dumps(document, indent=1) + "\n")
    text = as_markdown(results, names)
    (arguments.out / "training.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
