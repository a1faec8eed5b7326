"""`python -m benchmarks.recovery.pages`: from `kill -9` of a process with 300 MB of tensors until it is heard of."""

from __future__ import annotations

import os
import select
import signal
import statistics
import subprocess
import sys
import time

MEGABYTES = 300
ROUNDS = 7
OWNER = f"""
import time, torch
kept = [torch.ones(1_000_000 * 100, dtype=torch.uint8) for _ in range({MEGABYTES // 100})]
print("ready", flush=True)
time.sleep(600)
"""


def seconds_to_hear(*, in_huge_pages: bool) -> float:
    variables = {**os.environ, "THP_MEM_ALLOC_ENABLE": str(int(in_huge_pages))}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, env=variables) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        pidfd = os.pidfd_open(owner.pid)
        began = time.perf_counter()
        owner.send_signal(signal.SIGKILL)
        select.select([pidfd], [], [])
        seconds = time.perf_counter() - began
        os.close(pidfd)
    return seconds


def main() -> None:
    print("| pages | milliseconds, median (min–max) |\n| --- | --- |")
    found = [[seconds_to_hear(in_huge_pages=huge) * 1000 for huge in (False, True)] for _ in range(ROUNDS)]
    for name, times in zip(("small", "huge"), zip(*found, strict=True), strict=True):
        print(f"| {name} | {statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f}) |")


if __name__ == "__main__":
    main()
