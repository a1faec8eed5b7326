"""`python -m benchmarks.recovery`: from a fault to the next step, for each contestant, on three hosts of its own."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from benchmarks.data.store import make_bucket, running_store
from benchmarks.recovery.faults import FAULTS
from benchmarks.recovery.measure import LIMIT_SECONDS, REJOIN, Result, measure
from benchmarks.recovery.systems import BUCKET, SYSTEMS
from benchmarks.recovery.workload import MEGABYTE

T = TypeVar("T")
NUM_HOPELESS = 3
"""Rounds in which a contestant never went on after a fault, after which it is not tried again."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 100, 500], help="of state")
    parser.add_argument("--json", type=Path, help="where to write every single result")
    options = parser.parse_args()
    results: list[Result] = []
    with TemporaryDirectory(prefix="unbroken-bench-") as folder, running_store(Path(folder) / "store"):
        make_bucket(BUCKET)
        for megabytes in options.megabytes:
            for number in range(options.rounds):
                names = options.only[number % len(options.only) :] + options.only[: number % len(options.only)]
                for name in names:
                    faults = still_tried(options.faults, [r for r in results if _is_of(r, name, megabytes)])
                    for result in measure(name, megabytes * MEGABYTE, faults, parent=Path(folder)):
                        print(_line(result), file=sys.stderr, flush=True)
                        results.append(result)
                        if options.json:
                            options.json.write_text(json.dumps([asdict(result) for result in results]))
    print(as_markdown(results))


def still_tried(faults: Sequence[str], results: Sequence[Result]) -> list[str]:
    """Without what a contestant never survived: each time costs a minute, and the table says how often it was tried."""
    times = {fault: [r.maybe_seconds for r in results if r.fault == fault] for fault in faults}
    return [fault for fault, found in times.items() if len(found) < NUM_HOPELESS or any(s is not None for s in found)]


def _is_of(result: Result, name: str, megabytes: int) -> bool:
    return (result.system, result.num_bytes) == (name, megabytes * MEGABYTE)


def _line(result: Result) -> str:
    seconds = "never" if result.maybe_seconds is None else f"{result.maybe_seconds:.3f} s"
    about = f"{result.system}  {result.num_bytes // MEGABYTE} MB  {result.fault}"
    return f"{about}  {seconds}  redone {result.num_redone}  (a step: {result.step_seconds * 1000:.0f} ms)"


def as_markdown(results: Sequence[Result]) -> str:
    """Seconds from the fault to the next step: median (min–max)."""
    systems, sizes = _in_order(r.system for r in results), _in_order(r.num_bytes for r in results)
    lines = [f"| fault, state | {' | '.join(systems)} |", f"| --- |{' --- |' * len(systems)}"]
    for fault in [*FAULTS, REJOIN]:
        for num_bytes in sizes:
            found = [[r for r in results if (r.system, r.fault, r.num_bytes) == (s, fault, num_bytes)] for s in systems]
            if any(found):
                lines.append(f"| {fault}, {num_bytes // MEGABYTE} MB | {' | '.join(map(_cell, found))} |")
    return "\n".join(lines) + "\n"


def _cell(results: Sequence[Result]) -> str:
    seconds = [result.maybe_seconds for result in results if result.maybe_seconds is not None]
    if not seconds:
        return f"never in {LIMIT_SECONDS:.0f} s ({len(results)} of {len(results)})" if results else ""
    cell = f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
    redone = statistics.median(result.num_redone for result in results)
    cell += f", {redone:.0f} redone" if redone else ""
    num_never = len(results) - len(seconds)
    return cell + (f", never {num_never} of {len(results)}" if num_never else "")


def _in_order(values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    main()
