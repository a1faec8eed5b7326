"""One contestant's one task in a process of its own: prints the seconds of the timed part as one JSON line.

`python -m benchmarks.data.contestant NAME TASK KIND URL CACHE`, with RANK and WORLD_SIZE in the environment. Imports
and start-up are not timed.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

from benchmarks.data.records import KINDS, Checksum


def main() -> None:
    name, task, kind_name, url, cache = sys.argv[1:]
    module = importlib.import_module(f"benchmarks.data.contestants.{name}")
    kind, checksum = KINDS[kind_name], Checksum()
    kind.sample(0)
    start = time.perf_counter()
    if task == "write":
        module.write(kind, url, Path(cache))
    else:
        for x, y in module.read(kind, url, Path(cache), shuffled=task == "shuffled"):
            checksum.add(x, y)
    seconds = time.perf_counter() - start
    print("\n" + json.dumps({"seconds": seconds, "num_samples": checksum.num_samples, "total": checksum.total}))


if __name__ == "__main__":
    main()
