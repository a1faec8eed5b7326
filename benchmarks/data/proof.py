"""`python -m benchmarks.data.proof`: where the time of writing goes, in CPU seconds of client and store.

Beside the floor and this library stands the floor with the proof: what it does, and a sha256 of every source file, one
of every object, and a CRC that the store checks.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.data.contestants import floor, unbroken
from benchmarks.data.contestants.protocol import Task
from benchmarks.data.measure import Data, make_data
from benchmarks.data.records import columns, samples, source_files
from benchmarks.data.store import drop_bucket, make_bucket, running_store
from training.s3.objectstore import Store, StoreLocation

MIB = 1 << 20
FULL_BYTES = {"image": 256 * MIB, "token": 64 * MIB}


@dataclass(frozen=True)
class Cost:
    """Of one write, per GB."""

    seconds: float
    client_seconds: float
    store_seconds: float


def proven_floor(task: Task) -> Callable[[], None]:
    store = Store(StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=task.bucket))
    paths = source_files(task.source)
    num_together = max(1, floor.OBJECT_BYTES // paths[0].stat().st_size)

    def put(start: int) -> None:
        files = [path.read_bytes() for path in paths[start : start + num_together]]
        for data in files:
            hashlib.sha256(data).hexdigest()
            deque(samples(columns(np.frombuffer(data, dtype=task.kind.dtype))), maxlen=0)
        body = b"".join(files)
        store.send(f"{start:05d}", body, sha256=hashlib.sha256(body).hexdigest())

    def work() -> None:
        with ThreadPoolExecutor(floor.NUM_THREADS) as pool:
            list(pool.map(put, range(0, len(paths), num_together)))

    return work


WRITERS = {"floor": floor.write, "floor with the proof": proven_floor, "unbroken": unbroken.write}


def measure(write: Callable[[Task], Callable[[], None]], kind: str, data: Data) -> Cost:
    make_bucket("fresh")
    task = Task(
        action="write",
        kind_name=kind,
        source=str(data.folder),
        bucket="fresh",
        scratch="",
        chunk_bytes=0,
        num_processes=1,
        shuffled=False,
        checked=False,
    )
    work = write(task)
    client, store, started = time.process_time(), _store_seconds(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    gigabytes = data.num_bytes / 1e9
    cost = Cost(seconds / gigabytes, (time.process_time() - client) / gigabytes, (_store_seconds() - store) / gigabytes)
    drop_bucket("fresh")
    return cost


def _store_seconds() -> float:
    """CPU of all that this process started: the store."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.proof", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=1.0, help="of 256 MiB of images and 64 MiB of tokens")
    arguments = parser.parse_args()
    costs: dict[tuple[str, str], list[Cost]] = {}
    with tempfile.TemporaryDirectory(prefix="unbroken-bench-") as home:
        sizes = {kind: int(size * arguments.share) for kind, size in FULL_BYTES.items()}
        data = make_data(Path(home) / "source", sizes)
        with running_store(Path(home) / "store"):
            for number in range(arguments.rounds + 1):  # the first warms up
                names = list(WRITERS)
                for kind in data:
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        costs.setdefault((kind, name), []).append(measure(WRITERS[name], kind, data[kind]))
    for (kind, name), found in costs.items():
        _print(kind, name, found[1:], costs[kind, "floor"][1:])


def _print(kind: str, name: str, found: list[Cost], base: list[Cost]) -> None:
    ratios = [cost.seconds / floor.seconds for cost, floor in zip(found, base, strict=True)]
    client = statistics.median(cost.client_seconds for cost in found)
    store = statistics.median(cost.store_seconds for cost in found)
    print(
        f"{kind:6} {name:21} {statistics.median(ratios):.2f} of the floor's time"
        f" ({min(ratios):.2f} to {max(ratios):.2f}); CPU s/GB: client {client:.1f}, store {store:.1f}"
    )


if __name__ == "__main__":
    main()
