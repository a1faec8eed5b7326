"""Evidence files: what a soak run saw, with its seeds and its commit, under docs/evidence."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def write_evidence(name: str, *, rows: list[dict[str, Any]]) -> Path:
    """docs/evidence/NAME.json: one row per seed."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", ".", ":!docs/evidence"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    document = {
        "commit": commit.stdout.strip(),
        "uncommitted_changes": bool(dirty.stdout.strip()),
        "command": "make soak",
        "python": platform.python_version(),
        "rows": rows,
    }
    path = ROOT / "docs" / "evidence" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
