"""`python -m benchmarks.scale.measure`: agents counted at rest, when one is lost and when it is back, at 1 to 64 nodes.

Every agent is a process with real sockets and a real S3 (a SeaweedFS of the bench's own), and shares this machine with
all others. Points are added to a JSON file, one for each number of nodes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.data.store import make_bucket, running_store
from benchmarks.scale import commits, crowd, messages
from benchmarks.scale.counting import CountingProxy, since
from benchmarks.scale.fleet import BUCKET, Fleet
from training.cluster.protocol import Timing
from training.s3.objectstore import StoreLocation

POINTS = Path(__file__).with_name("points.json")
NODE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MESSAGE_NODE_COUNTS = (2, 8, 64, 256, 1024, 4096, 16_384)
RANK_COUNTS = (1, 2, 4, 8, 16, 32, 64)
CROWD_NODE_COUNTS = (4, 8, 16, 32)
REST_SECONDS = 20.0
MESSAGES_PER_SECOND = 1_500
"""That two cores can tell and hear beside all else."""
SETTLE_SECONDS = 3.0


def beat_seconds(num_nodes: int) -> float:
    """As it is, or as quick as this machine can bear when it is all nodes at once."""
    return max(Timing().beat, round(num_nodes * (num_nodes - 1) / MESSAGES_PER_SECOND, 1))


def measure_fleet(num_nodes: int, beat_seconds: float, endpoint: str, folder: Path) -> dict[str, Any]:
    """One point."""
    with (
        CountingProxy(endpoint) as proxy,
        Fleet(num_nodes, proxy, endpoint, folder, beat_seconds=beat_seconds) as fleet,
    ):
        last = num_nodes - 1
        found: dict[str, Any] = {"num_nodes": num_nodes, "beat_seconds": beat_seconds}
        found["start"] = _change(fleet, proxy, 0, fleet.start, range(num_nodes))
        time.sleep(SETTLE_SECONDS)
        found["rest"] = _rest(fleet, proxy)
        if num_nodes > 1:
            found["lost"] = _change(fleet, proxy, found["start"]["token"], fleet.kill, [last])
            time.sleep(SETTLE_SECONDS)
            found["back"] = _change(fleet, proxy, found["lost"]["token"], fleet.start, [last])
        return found


def _change(
    fleet: Fleet, proxy: CountingProxy, token: int, do: Callable[[int], None], nodes: Collection[int]
) -> dict[str, Any]:
    """From the group of that token until all that run train in another."""
    before, told, began = proxy.counts(), _told(fleet), time.monotonic()
    for node in nodes:
        do(node)
    new_token, pause = fleet.wait_for_group(after=token, newcomers=nodes)
    return {
        "token": new_token,
        "seconds": round(time.monotonic() - began, 3),
        "pause_seconds": round(pause, 3),
        "requests": since(before, proxy.counts()),
        "num_messages": _told(fleet) - told,
    }


def _rest(fleet: Fleet, proxy: CountingProxy) -> dict[str, Any]:
    """While nothing happens."""
    rows, cpu, before, began = fleet.rows, fleet.cpu_seconds(), proxy.counts(), time.monotonic()
    time.sleep(REST_SECONDS)
    seconds = time.monotonic() - began
    requests, later = since(before, proxy.counts()), fleet.rows
    spent = [b - a for a, b in zip(cpu, fleet.cpu_seconds(), strict=True)]
    told, told_bytes, heard = (
        sum(new[field] - old[field] for old, new in zip(rows, later, strict=True)) for field in range(3)
    )
    return {
        "seconds": round(seconds, 3),
        "requests": requests,
        "num_messages": told,
        "num_heard": heard,
        "message_bytes": told_bytes,
        "agent_cpu_seconds": round(statistics.median(spent), 3),
        "agent_cpu_seconds_at_most": round(max(spent), 3),
        "num_descriptors": fleet.num_descriptors(),
        "memory_bytes": fleet.memory_bytes(),
    }


def _told(fleet: Fleet) -> int:
    return sum(row.num_told for row in fleet.rows)


def keep(path: Path, part: str, point: dict[str, Any], key: str) -> None:
    """In the file, in place of the one with the same number of nodes or ranks."""
    print(json.dumps(point), file=sys.stderr, flush=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    others = [other for other in found.get(part, []) if other[key] != point[key]]
    found[part] = sorted([*others, point], key=lambda other: int(other[key]))
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.measure", description=__doc__)
    parser.add_argument("--agents", type=int, nargs="*", default=NODE_COUNTS, help="how many (1 to 64)")
    parser.add_argument("--beat", type=float, help="seconds between two statuses (0.1, or what the machine can bear)")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANK_COUNTS, help="that save a checkpoint")
    parser.add_argument("--messages", type=int, nargs="*", default=MESSAGE_NODE_COUNTS, help="nodes of one agent alone")
    parser.add_argument("--crowds", type=int, nargs="*", default=CROWD_NODE_COUNTS, help="nodes in simulated time")
    parser.add_argument("--json", type=Path, default=POINTS, help="the file of points")
    options = parser.parse_args()
    for num_nodes in options.messages:
        keep(options.json, "messages", messages.measure(num_nodes), "num_nodes")
    for num_nodes in options.crowds:
        keep(options.json, "crowds", crowd.measure(num_nodes), "num_nodes")
    with TemporaryDirectory(prefix="unbroken-scale-") as folder, running_store(Path(folder) / "store"):
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        make_bucket(BUCKET)
        location = StoreLocation(endpoint=endpoint, bucket=BUCKET)
        for num_ranks in options.ranks:
            keep(options.json, "commits", commits.measure(num_ranks, location), "num_ranks")
        for num_nodes in options.agents:
            corner = Path(folder) / f"{num_nodes}"
            corner.mkdir()
            point = measure_fleet(num_nodes, options.beat or beat_seconds(num_nodes), endpoint, corner)
            keep(options.json, "agents", point, "num_nodes")


if __name__ == "__main__":
    main()
