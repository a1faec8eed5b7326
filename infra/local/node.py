"""One node of a local job, as supervisord starts it: it becomes the job's command, unless that keeps dying at once.

Supervisord itself restarts without a pause and without end, or takes a command that is done quickly for a failed one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from infra.local.files import write_whole

QUICK_SECONDS = 20.0
NUM_FREE_STARTS = 15
MAX_PAUSE_SECONDS = 10.0
NUM_STARTS_BEFORE_GIVING_UP = 60  # some seven minutes
EXIT_CANCELLED, EXIT_NO_COMMAND, EXIT_GIVEN_UP = 0, 2, 4


def job_path(home: Path, key: str) -> Path:
    """What the job's nodes run."""
    return home / "jobs" / f"{key}.json"


def starts_path(home: Path, key: str, node: str) -> Path:
    """When this node was started, as far as that was a quick series."""
    return home / "jobs" / f"{key}.starts{node}"


def quick_series(starts: Sequence[float], now: float) -> list[float]:
    """The last of `starts` that followed one another quickly, up to `now`; empty if the last one lived long enough."""
    series: list[float] = []
    later = now
    for start in reversed(starts):
        if not 0 <= later - start < QUICK_SECONDS:
            break
        series.insert(0, start)
        later = start
    return series


def pause_seconds(num_quick_starts: int) -> float:
    """How long to wait before one more start: at first not at all, since a killed node should be back at once."""
    if num_quick_starts < NUM_FREE_STARTS:
        return 0.0
    return min(2.0 ** min(num_quick_starts - NUM_FREE_STARTS, 10), MAX_PAUSE_SECONDS)


def _note_start(path: Path) -> int:
    """Returns how many quick starts came before this one."""
    now = time.time()
    try:
        starts = [float(line) for line in path.read_text().split()]
    except (OSError, ValueError):
        starts = []
    series = quick_series(starts, now)
    write_whole(path, "".join(f"{start}\n" for start in [*series, now]))
    return len(series)


def main() -> None:
    """`python -m infra.local.node HOME KEY NODE`"""
    home, key, node = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    try:
        job = json.loads(job_path(home, key).read_text())
    except FileNotFoundError:  # cancelled between the node's death and its restart
        sys.exit(EXIT_CANCELLED)
    num_quick = _note_start(starts_path(home, key, node))
    if num_quick >= NUM_STARTS_BEFORE_GIVING_UP:
        print(f"node {node} died {num_quick} times in a row soon after its start: given up", flush=True)
        sys.exit(EXIT_GIVEN_UP)
    time.sleep(pause_seconds(num_quick))
    _become([part.replace("{node}", node) for part in job["command"]], job["environment"])


def _become(command: list[str], environment: dict[str, str]) -> None:
    try:
        os.execvpe(command[0], command, {**os.environ, **environment})
    except OSError as error:
        print(f"cannot run {command[0]}: {error}", flush=True)
        sys.exit(EXIT_NO_COMMAND)


if __name__ == "__main__":
    main()
