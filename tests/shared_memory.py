"""What processes have in shared memory, by its names. Others come and go there: only a process's own are its fault."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FOLDER = Path("/dev/shm")
GONE = " (deleted)"
"""What the kernel adds to the name of a file that is mapped and has none any more."""


def names_mapped_by(pids: Iterable[int]) -> list[Path]:
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
    paths = {Path(line[line.index("/") :]) for text in maps for line in text.splitlines() if "/" in line}
    return sorted(path for path in paths if path.parent == FOLDER and not path.name.endswith(GONE))
