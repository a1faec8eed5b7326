"""`python -m benchmarks.servers failover|transport|peers|deaths`."""

from __future__ import annotations

import sys

from benchmarks.servers import deaths, failover, peers, transport

BENCHES = {
    "failover": failover.main,
    "transport": transport.main,
    "peers": peers.main,
    "deaths": deaths.main,
}


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in BENCHES:
        sys.exit(f"usage: python -m benchmarks.servers {'|'.join(BENCHES)} [--help]")
    BENCHES[name](arguments)


if __name__ == "__main__":
    main()
