"""What a person sees of a job's nodes while it is followed: how many run or wait, and what they wrote."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

from infra.launcher import JobStatus, Launcher

log = logging.getLogger(__name__)

MAX_BYTES_AT_ONCE = 64 << 10
"""Of a node's log; what a node wrote before that is only in its file."""


class Nodes:
    """Of one job. What its nodes had written before this was made is not shown again."""

    def __init__(self, launcher: Launcher, key: str) -> None:
        self._launcher = launcher
        self._key = key
        self._states = ""
        self._offsets = {path: _num_bytes(path) for path in launcher.logs(key)}

    def show(self, status: JobStatus | None) -> None:
        """What is new."""
        states = describe(status)
        if states != self._states:
            self._states = states
            log.info("nodes: %s", states)
        for path in self._launcher.logs(self._key):
            for line in self._new_lines(path):
                log.info("%s: %s", path.stem, line)

    def _new_lines(self, path: Path) -> list[str]:
        """Whole lines; one that is still being written is left for the next time."""
        size = _num_bytes(path)
        offset = max(self._offsets.get(path, 0), size - MAX_BYTES_AT_ONCE)
        if offset >= size:
            return []
        with path.open("rb") as file:
            file.seek(offset)
            written = file.read(size - offset)
        whole = written[: written.rfind(b"\n") + 1]
        self._offsets[path] = offset + len(whole)
        return whole.decode(errors="replace").splitlines()


def _num_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def describe(status: JobStatus | None) -> str:
    """Such as `2 RUNNING, 2 PENDING (Resources)`."""
    if status is None:
        return "none"
    counts = Counter(_without_place(state) for state in status.nodes.values())
    return ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) or status.state.value


def _without_place(state: str) -> str:
    """Where a node runs is its own affair; why it waits is not."""
    return state.partition(" ")[0] if state.startswith("RUNNING") else state
