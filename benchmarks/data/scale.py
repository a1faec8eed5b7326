"""`python -m benchmarks.data.scale`: memory and the first batch, from 10^5 to 10^8 samples and from sample 0 to 10^8.

The manifest is synthetic: it names one and the same shard many times. Nothing but its length differs.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from training.data.cache import ShardCache
from training.data.manifest import FieldInfo, Manifest, describe_shard
from training.data.order import Order
from training.data.reader import Reader
from training.data.shard import encode_shard
from training.data.stream import Stream

SHARD_SAMPLES = 4_000
BATCH_SIZE = 64
NUM_ROUNDS = 9


def measure(num_samples: int, start: int) -> dict[str, float]:
    """Seconds to the first batch at sample `start` (median), and the peak resident memory of this process."""
    data = encode_shard([f"f:{n}" for n in range(SHARD_SAMPLES)], {"x": np.zeros((SHARD_SAMPLES, 64), dtype=np.uint8)})
    info = describe_shard(data, num_samples=SHARD_SAMPLES)
    fields = {"x": FieldInfo(dtype="uint8", shape=(64,))}
    manifest = Manifest(fields=fields, splits={"train": (info,) * (num_samples // SHARD_SAMPLES), "test": (info,)})
    manifest = Manifest.from_bytes(manifest.to_bytes())
    seconds = []
    for _ in range(NUM_ROUNDS):
        began = time.perf_counter()
        order = Order(manifest.shard_sizes("train"), 1, BATCH_SIZE, 8, 1)
        reader = Reader(ShardCache(lambda _: data, manifest.splits["train"]), order.shard_sizes, manifest.fields)
        step = start // BATCH_SIZE
        batches = iter(Stream(reader, order, workers=range(8), step=step, num_steps=step + 1))
        next(batches)
        seconds.append(time.perf_counter() - began)
        list(batches)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "peak_mib": peak_bytes / 2**20}


def compare() -> dict[str, float]:
    """Each measured in a process of its own: growth of memory, and the ratio of the first batches."""
    small, large, late = (_in_a_process(*place) for place in ((10**5, 0), (10**8, 0), (10**8, 10**8)))
    return {
        "growth_mib": large["peak_mib"] - small["peak_mib"],
        "first_batch_seconds_at_0": large["seconds"],
        "first_batch_seconds_at_1e8": late["seconds"],
        "first_batch_ratio": late["seconds"] / large["seconds"],
    }


def _in_a_process(num_samples: int, start: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data.scale", str(num_samples), str(start)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2])) if sys.argv[1:] else compare()))
