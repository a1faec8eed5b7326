"""`python -m benchmarks.data`: the whole bench (`make bench`), or a smoke test of it with `--quick`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.data.fleet import CONTESTANTS, Runner
from benchmarks.data.measure import Bench, all_cases, make_data
from benchmarks.data.report import as_json, as_markdown
from benchmarks.data.store import running_store
from benchmarks.environments import ENVIRONMENTS, ready_python

MIB = 1 << 20
FULL_BYTES = {"image": 256 * MIB, "token": 64 * MIB}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the store is stopped too
    arguments = _arguments()
    bench = _run(arguments)
    about = {"rounds": arguments.rounds, "share": arguments.share, "cpus": os.cpu_count(), "os": platform.platform()}
    (arguments.out / "data.json").write_text(json.dumps(as_json(bench, about), indent=1) + "\n")
    text = as_markdown(bench)
    (arguments.out / "data.md").write_text(text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little data, one round: a smoke test, not a measurement")
    parser.add_argument("--rounds", type=int, default=None, help="after the warm-up round (7)")
    parser.add_argument("--share", type=float, default=None, help="of the full data, 256 MiB and 64 MiB (1)")
    parser.add_argument("--only", nargs="+", default=[c.name for c in CONTESTANTS], help="some of the contestants")
    parser.add_argument("--cases", default="", help="only cases whose title holds this text")
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS, help="where peers are installed")
    parser.add_argument("--out", type=Path, default=ENVIRONMENTS / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 7)
    arguments.share = arguments.share or (1 / 8 if arguments.quick else 1)
    return arguments


def _run(arguments: argparse.Namespace) -> Bench:
    started = time.monotonic()
    chosen = [c for c in CONTESTANTS if c.name in {*arguments.only, "floor", "unbroken"}]
    pythons = {c.name: ready_python(c, arguments.environments) for c in chosen}
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unbroken-bench-")))
        data = make_data(home / "source", {kind: int(size * arguments.share) for kind, size in FULL_BYTES.items()})
        stack.enter_context(running_store(home / "store"))
        runners = {c.name: Runner(c, pythons[c.name], arguments.out / f"{c.name}.log") for c in chosen}
        for runner in runners.values():
            stack.callback(runner.stop)
        bench = Bench(runners, data, home / "scratch")
        bench.prepare()
        for number in range(arguments.rounds + 1):
            bench.run_round(number, [case for case in all_cases() if arguments.cases in case.title])
        bench.try_damage()
    print(f"measured in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return bench


if __name__ == "__main__":
    main()
