"""The same sources compiled by mypyc, for very many schedules: half the time, the same events.

`python -m tests.simulation.compiled NUM`, in such a copy, prints what the first NUM seeds gave, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.simulation.many import rows_of, run_side_by_side
from tests.simulation.runner import run_many

ROOT = Path(__file__).parents[2]
MODULES = [
    *(f"training/cluster/{name}.py" for name in ("node", "next_group", "membership", "protocol")),
    *(
        f"tests/simulation/{name}.py"
        for name in ("agent", "clock", "network", "world", "workers", "store", "invariants")
    ),
]
NUM_COMPARED = 300


def compile_in(folder: Path) -> None:
    """Put a copy of the sources there, with the node's and the simulation's inner modules compiled."""
    for name in ("training", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = [str(Path(sys.executable).with_name("mypyc")), *MODULES]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def run_in(folder: Path, num_seeds: int) -> dict[str, Any]:
    """What `main` prints there."""
    command = [sys.executable, "-m", "tests.simulation.compiled", str(num_seeds)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def first_fingerprints() -> list[int]:
    """By which compiled and interpreted code are compared."""
    return sorted(run_many(range(NUM_COMPARED)).fingerprints)


def main() -> None:
    began = time.monotonic()
    summary = run_side_by_side(range(int(sys.argv[1])), os.cpu_count() or 1)
    rows = rows_of(summary, seconds=time.monotonic() - began)
    node = sys.modules["training.cluster.node"]
    print(json.dumps({"rows": rows, "node": node.__file__, "first_fingerprints": first_fingerprints()}))


if __name__ == "__main__":
    main()
