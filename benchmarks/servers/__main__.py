"""`python -m benchmarks.servers failover|transport`."""

from __future__ import annotations

import sys

from benchmarks.servers import failover, transport

BENCHES = {"failover": failover.main, "transport": transport.main}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in BENCHES:
        sys.exit(f"usage: python -m benchmarks.servers {'|'.join(BENCHES)} [--help]")
    BENCHES[name](arguments)


if __name__ == "__main__":
    main()
