"""`python -m benchmarks.servers deaths`: a peer's server is killed in the midst of steps; what its workers do then.

Ours is in `failover`: its agents make the next step from the backups. Here nobody starts anything again.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Sequence

from benchmarks.servers.peers import MEGABYTE, NUM_WARM_UP, PEERS, Way, start
from benchmarks.servers.pushes import WIDTH, Case

NUM_WORKERS, NUM_SERVERS = 2, 2
MANY = 10**6
BEFORE_SECONDS = 1.0


def suffer(way: Way, case: Case, limit_seconds: float) -> tuple[float | None, str]:
    """After how long the last of the workers had ended, if they did, and the last word of what they said."""
    processes = start(way, way.deal([case], NUM_WORKERS, NUM_SERVERS))
    try:
        processes.ask(f"0 {NUM_WARM_UP}")
        processes.tell(f"0 {MANY}")
        time.sleep(BEFORE_SECONDS)
        killed = time.monotonic()
        processes.all[-1].kill()
        for worker in processes.asked:
            worker.wait(timeout=max(0.0, killed + limit_seconds - time.monotonic()))
        return time.monotonic() - killed, _last_error(processes.log())
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        processes.stop()


def _last_error(log: str) -> str:
    return next((line for line in reversed(log.splitlines()) if "Error" in line), "")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers deaths", description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--limit-seconds", type=float, default=180.0)
    options = parser.parse_args(arguments)
    case = Case(num_rows=options.megabytes * MEGABYTE // (4 * WIDTH))
    print("| server killed | until all workers had ended, s | with |")
    print("| --- | --- | --- |")
    for way in PEERS:
        found = [suffer(way, case, options.limit_seconds) for _ in range(options.kills)]
        seconds = [f"never in {options.limit_seconds:.0f}" if one is None else f"{one:.2f}" for one, _ in found]
        print(f"| {way.title} | {', '.join(seconds)} | {found[-1][1][:160]} |", flush=True)
