"""A writer that sends its shards, says so, and makes the manifest when it is told to; stopped or killed between."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.unit.data_source import data_config, local_source
from tests.unit.tiny import Tiny
from training.data.lease import LEASE_SECONDS, Lease, writing
from training.data.writer import Writer
from training.s3.objectstore import Store, StoreLocation


def main() -> None:
    """Arguments: the store's location as JSON, the folder of the source, and the seconds that a claim lasts."""
    store, folder = Store(StoreLocation(**json.loads(sys.argv[1]))), Path(sys.argv[2])
    config = data_config()
    writer = Writer(store, local_source(folder, config), config, Tiny())
    with writing(store, config.name, seconds=float(sys.argv[3])) as lease:
        results = [writer.write(part) for part in writer.parts]
        print("sent", flush=True)
        sys.stdin.readline()
        _enter_again_for_long(lease)
        print(writer.finish(results, lease).manifest.digest, flush=True)


def _enter_again_for_long(lease: Lease) -> None:
    """A second claim is to hold, on however slow a machine."""
    enter_again = lease.enter_again

    def enter() -> None:
        lease._seconds = LEASE_SECONDS
        enter_again()

    lease.enter_again = enter  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
