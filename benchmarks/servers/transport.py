"""`python -m benchmarks.servers transport`: a vector pushed and its sum pulled by two workers, beside gloo's all-reduce
of the same bytes, everybody in turn.

Each worker is a process, and has the servers in it, as in training; a backup is in the other one. Servers keep the sum
as it is, so that nothing is measured but what goes to and fro and what is added.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.servers.processes import Processes
from benchmarks.servers.rank import NUM_RANKS

TARGET_SECONDS = 0.3
NUM_WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Way:
    name: str
    num_servers: int = 0
    num_replicas: int = 0

    @property
    def title(self) -> str:
        return f"{self.name}, S={self.num_servers}, R={self.num_replicas}" if self.num_servers else self.name


GLOO = Way(name="gloo")
WAYS = [
    Way(name=name, num_servers=servers, num_replicas=replicas)
    for name in ("sockets", "memory")
    for servers in (1, 2)
    for replicas in (1, 2)
]


class Ranks(Processes):
    """Two, which wait until they are told how often."""

    def __init__(self, way: Way, megabytes: int) -> None:
        numbers = [str(number) for number in (megabytes, way.num_servers, way.num_replicas)]
        super().__init__([sys.executable, "-m", "benchmarks.servers.rank", way.name, *numbers], num_asked=NUM_RANKS)

    def seconds(self, num_times: int) -> float:
        """Each takes, of the slower one."""
        return float(max(self.ask(str(num_times)))) / num_times


def measure(megabytes: int, ways: Sequence[Way], num_rounds: int) -> dict[Way, list[float]]:
    """Seconds of each round."""
    ranks = {way: Ranks(way, megabytes) for way in (GLOO, *ways)}
    found: dict[Way, list[float]] = {way: [] for way in ranks}
    try:
        for one in ranks.values():
            one.seconds(NUM_WARM_UP)
        num_times = max(1, round(TARGET_SECONDS / ranks[GLOO].seconds(NUM_WARM_UP)))
        for number in range(num_rounds):
            order = list(ranks)
            for way in order[number % len(order) :] + order[: number % len(order)]:
                found[way].append(ranks[way].seconds(num_times))
    finally:
        for one in ranks.values():
            one.stop()
    return found


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers transport", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[4, 25, 100])
    options = parser.parse_args(arguments)
    print(f"| seconds / gloo's, median (min–max) | {' | '.join(way.title for way in WAYS)} |")
    print("| --- |" + " --- |" * len(WAYS))
    for megabytes in options.megabytes:
        found = measure(megabytes, WAYS, options.rounds)
        base = statistics.median(found[GLOO])
        cells = [_cell(found[way], found[GLOO]) for way in WAYS]
        print(f"| {megabytes} MB ({base * 1000:.1f} ms) | {' | '.join(cells)} |", flush=True)


def _cell(seconds: Sequence[float], base: Sequence[float]) -> str:
    ratios = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
