"""One node of a local job, as supervisord starts it: it becomes the job's command, unless that keeps dying at once.

Supervisord itself restarts without a pause and without end, or takes a command that is done quickly for a failed one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from infra.local.files import write_whole
from infra.restarts import EXIT_GIVEN_UP, NUM_STARTS_BEFORE_GIVING_UP, pause_seconds, quick_series

EXIT_CANCELLED, EXIT_NO_COMMAND = 0, 2


def job_path(home: Path, key: str) -> Path:
    """What the job's nodes run."""
    return home / "jobs" / f"{key}.json"


def starts_path(home: Path, key: str, node: str) -> Path:
    """When this node was started, as far as that was a quick series."""
    return home / "jobs" / f"{key}.starts{node}"


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
