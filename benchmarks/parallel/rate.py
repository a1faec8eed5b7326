"""The step rate of sharded state with the bits of one process, beside that of PyTorch's own FSDP2, on two ranks.

Both are in the same processes, which make some steps of each in turn, of the same model and samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

from benchmarks.parallel.ranks import answers_of

NUM_RANKS = 2
SIZES = {"3M": 256, "13M": 512}
"""Widths, by the number of parameters, about."""
VIRTUAL_WORKERS = (2, 8)
BASE = "FSDP2"
OURS = "**Unbroken**"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel rate", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--virtual-workers", nargs="+", type=int, default=VIRTUAL_WORKERS)
    asked = parser.parse_args(arguments)
    rows = []
    for size in asked.sizes:
        for number in asked.virtual_workers:
            print(f"{size}, {number} virtual workers …", file=sys.stderr, flush=True)
            answers = answers_of("rate_rank", SIZES[size], number, asked.rounds, num_ranks=NUM_RANKS)
            rows.append((f"{size} parameters, {number} virtual workers", _slowest(answers)))
    print(_as_markdown(rows))


def _slowest(answers: Sequence[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Seconds per step of each round, of the rank that took longest."""
    return {name: [max(each) for each in zip(*(one[name] for one in answers), strict=True)] for name in answers[0]}


def _as_markdown(rows: Sequence[tuple[str, dict[str, list[float]]]]) -> str:
    """Step rate over that of the base in the same round: median (min–max)."""
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    lines = ["| step rate / FSDP2's, median (min–max) | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for title, found in rows:
        cells = [_cell(found[BASE], found[name]) if name in found else "" for name in names]
        lines.append(f"| {title} ({statistics.median(found[BASE]) * 1000:.0f} ms) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(base: Sequence[float], mine: Sequence[float]) -> str:
    ratios = [one / other for one, other in zip(base, mine, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
