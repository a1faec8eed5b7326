"""`python -m tests.simulation SEED` replays one schedule; `--seeds N --start S` runs many on two processes."""

from __future__ import annotations

import argparse
import time

from tests.simulation.many import run_side_by_side, tell
from tests.simulation.runner import shrink, simulate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("seed", nargs="?", type=int, help="replay this one, with all that happens")
    parser.add_argument("--seeds", type=int, default=1000, help="how many to run (1000)")
    parser.add_argument("--start", type=int, default=0, help="the first of them (0)")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        trace = simulate(arguments.seed, tracing=True)
        if trace.maybe_violation is not None:
            trace = shrink(trace)
            print(f"shrunk to {len(trace.faults)} faults")
        print(*trace.lines, sep="\n")
        print(f"{trace.outcome}, {trace.num_events} events, {trace.num_tokens} tokens; broken: {trace.maybe_violation}")
        return
    began = time.monotonic()
    summary = run_side_by_side(range(arguments.start, arguments.start + arguments.seeds), arguments.processes)
    print(tell(summary, seconds=time.monotonic() - began))
    raise SystemExit(bool(summary.broken))


if __name__ == "__main__":
    main()
