"""One rank that reads and nothing else: prints a line with the ids of each step. Killed at will by a test."""

from __future__ import annotations

import json
import sys

from tests.unit.reading import make_reader
from training.arithmetic.reduce import owned_range
from training.data.manifest import load_manifest
from training.data.order import Order
from training.data.stream import Stream
from training.s3.objectstore import Store, StoreLocation


def main() -> None:
    """Argument: a JSON document of what to read."""
    told = json.loads(sys.argv[1])
    store = Store(StoreLocation(**told["location"]))
    manifest = load_manifest(store, told["dataset"], told["digest"])
    order = Order(manifest.shard_sizes("train"), *told["order"])
    workers = owned_range(told["rank"], told["world_size"], order.virtual_workers)
    reader = make_reader(store, told["dataset"], manifest, "train")
    stream = Stream(reader, order, workers=workers, step=told["step"], num_steps=told["num_steps"])
    for batch in stream:
        print(json.dumps([batch.step, batch.worker, list(batch.ids)]), flush=True)
        if batch.step == told["stop"]:
            sys.stdin.read()  # until it is killed; what reads ahead goes on


if __name__ == "__main__":
    main()
