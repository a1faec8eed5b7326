"""`python -m benchmarks.parallel memory`."""

from __future__ import annotations

import sys

from benchmarks.parallel import memory

BENCHES = {"memory": memory.main}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in BENCHES:
        sys.exit(f"usage: python -m benchmarks.parallel {'|'.join(BENCHES)} [--help]")
    BENCHES[name](arguments)


if __name__ == "__main__":
    main()
