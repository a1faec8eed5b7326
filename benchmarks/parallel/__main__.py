"""`python -m benchmarks.parallel memory`, `rate` or `bubble`."""

from __future__ import annotations

import sys

from benchmarks.parallel import bubble, memory, rate

BENCHES = {"memory": memory.main, "rate": rate.main, "bubble": bubble.main}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in BENCHES:
        sys.exit(f"usage: python -m benchmarks.parallel {'|'.join(BENCHES)} [--help]")
    BENCHES[name](arguments)


if __name__ == "__main__":
    main()
