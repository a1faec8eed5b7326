"""A writer that shards the tiny source once and says which version it made. Killed at will by a test."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.unit.data_source import data_config, local_source
from tests.unit.tiny import Tiny
from training.data.writer import write_dataset
from training.s3.objectstore import Store, StoreLocation


def main() -> None:
    """Arguments: the store's location as JSON, and the folder of the source."""
    store, folder = Store(StoreLocation(**json.loads(sys.argv[1]))), Path(sys.argv[2])
    config = data_config()
    print(write_dataset(store, local_source(folder, config), config, Tiny()).manifest.digest, flush=True)


if __name__ == "__main__":
    main()
