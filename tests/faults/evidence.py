"""Evidence files: what a soak run saw, with its seeds and its commit, under docs/evidence."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import tempfile
from operator import itemgetter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def write_evidence(name: str, *, rows: list[dict[str, Any]]) -> Path:
    """docs/evidence/NAME.json: one row per seed."""
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", ".", ":!docs/evidence"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    document = {
        "commit": _commit(),
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "command": "make soak",
        "python": platform.python_version(),
        "rows": rows,
    }
    path = _path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def keep_row(name: str, row: dict[str, Any], *, key: str) -> None:
    """One row more in the file, in the place of an earlier one of the same `row[key]`. Tests in several processes may
    each have some, if all run on one commit: rows of another are left out."""
    with (Path(tempfile.gettempdir()) / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(_path(name).read_text()) if _path(name).exists() else {}
        rows = [one for one in known.get("rows", []) if one[key] != row[key] and known["commit"] == _commit()]
        write_evidence(name, rows=sorted([*rows, row], key=itemgetter(key)))


def _path(name: str) -> Path:
    return ROOT / "docs" / "evidence" / f"{name}.json"


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
