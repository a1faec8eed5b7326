"""`python -m benchmarks.training.sharded`: the step rate of exact sharded state, as a ratio to plain FSDP2's."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks.environments import ENVIRONMENTS
from benchmarks.training.__main__ import NUM_WARM_UP_STEPS, TARGET_SECONDS, Case, groups_of
from benchmarks.training.workload import WIDTHS

KINDS = {"one-batch": "V = ranks", "microbatches": "V = 8"}
"""One microbatch per rank, or the virtual workers' own."""


def ratios(case: Case, kind: str, num_rounds: int, log: Path) -> tuple[list[float], float]:
    """Of each round: FSDP2's time over ours; and the time of its step, in seconds."""
    theirs, ours = f"fsdp2 {kind}", f"sharded {kind}"
    found: dict[str, list[float]] = {theirs: [], ours: []}
    with groups_of(case, dict.fromkeys(found, sys.executable), log) as groups:
        for group in groups.values():
            group.seconds(NUM_WARM_UP_STEPS)
        num_steps = max(1, round(TARGET_SECONDS / groups[theirs].seconds(1)))
        for number in range(num_rounds):
            for name in sorted(found, reverse=number % 2 == 1):
                found[name].append(groups[name].seconds(num_steps) / num_steps)
    pairs = zip(found[theirs], found[ours], strict=True)
    return [base / mine for base, mine in pairs], statistics.median(found[theirs])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.sharded", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=list(WIDTHS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2])
    parser.add_argument("--out", type=Path, default=ENVIRONMENTS / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| step rate / FSDP2's, median (min–max) | " + " | ".join(KINDS.values()) + " |\n| --- | --- | --- |")
    for case in (Case(size=size, world_size=ranks) for size in arguments.sizes for ranks in arguments.ranks):
        cells = []
        for kind in KINDS:
            found, seconds = ratios(case, kind, arguments.rounds, arguments.out / "sharded.log")
            cells.append(f"{statistics.median(found):.2f} ({min(found):.2f}–{max(found):.2f}), {seconds * 1000:.0f} ms")
        print(f"| {case.title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
