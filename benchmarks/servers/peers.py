"""`python -m benchmarks.servers peers`: steps of workers that push gradients to servers and pull what these made of
them, beside torch.distributed.rpc's and torchft's parameter servers, and gloo's all-reduce without any.

Everybody in turn, a process for each worker and each server; who is not asked stands still. A step of ours has two
phases, the norm and a decision; the others' servers add up and step. All make the same steps of SGD, and must have the
same bits after each turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import ENVIRONMENTS, Contestant, ready_python
from benchmarks.recovery.systems import TORCHFT
from benchmarks.servers.processes import Processes
from benchmarks.servers.pushes import WIDTH, Case, Deal

TARGET_SECONDS = 0.3
NUM_WARM_UP = 4
MEGABYTE = 1_000_000
GLOO, TORCH_RPC = Contestant("gloo", "gloo"), Contestant("torch_rpc", "torch RPC")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A contestant, and how it is set."""

    contestant: Contestant
    way: str = ""
    num_replicas: int = 1

    @property
    def title(self) -> str:
        replicas = f", R={self.num_replicas}" if self.contestant.name == "unbroken" else ""
        return f"{self.contestant.title}{', ' * bool(self.way)}{self.way}{replicas}"

    def deal(self, cases: Sequence[Case], num_workers: int, num_servers: int) -> Deal:
        return Deal(
            cases=cases,
            num_workers=num_workers,
            num_servers=0 if self.contestant == GLOO else num_servers,
            num_replicas=self.num_replicas,
            way=self.way,
        )


UNBROKEN = Contestant("unbroken", "**Unbroken**")
FLOOR = Way(contestant=GLOO)
OURS = [
    Way(contestant=UNBROKEN, way=way, num_replicas=replicas) for way in ("sockets", "memory") for replicas in (1, 2)
]
PEERS = [Way(contestant=TORCH_RPC, way="sockets"), Way(contestant=TORCH_RPC, way="memory"), Way(contestant=TORCHFT)]
WAYS = [*OURS, *PEERS]


def start(way: Way, deal: Deal, environments: Path = ENVIRONMENTS) -> Processes:
    python = ready_python(way.contestant, environments)
    return Processes(
        [python, "-m", f"benchmarks.servers.contestants.{way.contestant.name}", deal.encode()],
        num_asked=deal.num_workers,
        num_processes=deal.num_processes,
    )


@contextmanager
def started(ways: Sequence[Way], cases: Sequence[Case], workers: int, servers: int) -> Iterator[dict[Way, Processes]]:
    with ExitStack() as stack:
        found = {way: start(way, way.deal(cases, workers, servers)) for way in ways}
        for processes in found.values():
            stack.callback(processes.stop)
        yield found


def turn(processes: Mapping[Way, Processes], order: Sequence[Way], case: int, num_times: int) -> dict[Way, float]:
    """Seconds of a step, of the slowest worker."""
    replies = {way: processes[way].ask(f"{case} {num_times}") for way in order}
    digests = {reply["digest"] for one in replies.values() for reply in one}
    if len(digests) > 1:
        raise SystemExit(f"the parameters differ: {replies}")
    return {way: max(float(reply["seconds"]) for reply in one) / num_times for way, one in replies.items()}


def measure(
    ways: Sequence[Way], cases: Sequence[Case], workers: int, servers: int, num_rounds: int
) -> list[dict[Way, list[float]]]:
    """Of each case, the seconds of each round."""
    found: list[dict[Way, list[float]]] = [{way: [] for way in ways} for _ in cases]
    with started(ways, cases, workers, servers) as processes:
        for case in range(len(cases)):
            turn(processes, ways, case, NUM_WARM_UP)
            num_times = max(1, round(TARGET_SECONDS / turn(processes, ways, case, NUM_WARM_UP)[FLOOR]))
            for number in range(num_rounds):
                first = number % len(ways)
                for way, seconds in turn(processes, [*ways[first:], *ways[:first]], case, num_times).items():
                    found[case][way].append(seconds)
    return found


def ratios(seconds: Sequence[float], base: Sequence[float]) -> str:
    """Of the same rounds."""
    found = [mine / theirs for mine, theirs in zip(seconds, base, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def as_markdown(title: str, found: Mapping[str, Mapping[Way, Sequence[float]]], base: Way, ways: Sequence[Way]) -> str:
    lines = [f"| {title} | {' | '.join(way.title for way in ways)} |", "| --- |" + " --- |" * len(ways)]
    for row, seconds in found.items():
        cells = [ratios(seconds[way], seconds[base]) for way in ways]
        lines.append(f"| {row} ({statistics.median(seconds[base]) * 1000:.1f} ms) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers peers", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layouts", nargs="+", default=["2x1", "2x2", "4x2", "4x4"], help="workers x servers")
    parser.add_argument("--only", nargs="+", default=[""], help="those whose titles have one of these in them")
    parser.add_argument("--megabytes", type=int, default=25, help="of the dense parameter")
    parser.add_argument("--rows", type=int, default=262_144, help=f"of the table, of {WIDTH} elements each")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.01, 0.001], help="of a worker's gradient")
    options = parser.parse_args(arguments)
    dense = Case(num_rows=options.megabytes * MEGABYTE // (4 * WIDTH))
    cases = [dense, *(Case(num_rows=options.rows, density=density) for density in options.densities)]
    ways = [way for way in WAYS if any(word in way.title for word in options.only)]
    found: dict[str, dict[Way, list[float]]] = {}
    for layout in options.layouts:
        workers, servers = map(int, layout.split("x"))
        print(f"{workers} workers, {servers} servers …", file=sys.stderr, flush=True)
        measured = measure([FLOOR, *ways], cases, workers, servers, options.rounds)
        for case, seconds in zip(cases, measured, strict=True):
            found[f"{case.title}; W={workers}, S={servers}"] = seconds
    print(as_markdown("seconds / gloo's, median (min–max)", found, FLOOR, ways))
    for own in (way for way in ways if way in OURS):
        peers = [way for way in ways if way in PEERS and way.way in ("", own.way)]
        print(as_markdown(f"seconds / those of {own.title}, median (min–max)", found, own, peers))


if __name__ == "__main__":
    main(sys.argv[1:])
