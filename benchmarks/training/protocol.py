"""One rank of a contestant: told by JSON lines on standard input how many steps to time, replies with the seconds."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.training.workload import Workload

Make = Callable[[Workload], Iterator[None]]
"""What does one training step each time it is asked for the next value."""


def serve(make: Make) -> None:
    """Until standard input closes. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    dist.init_process_group(  # a file, since a free port may be taken by another group before this one listens
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=120),
    )
    barriers = dist.new_group()  # of the bench's own: a library may have a thread that uses the other one
    workload = Workload(size=sys.argv[1], rank=dist.get_rank(), world_size=dist.get_world_size())
    steps = make(workload)
    for line in sys.stdin:
        replies.write(json.dumps(_timed(steps, int(line), barriers)) + "\n")
        replies.flush()
    os._exit(0)


def _timed(steps: Iterator[None], num_steps: int, barriers: Any) -> float:
    dist.barrier(barriers)
    started = time.perf_counter()
    for _ in range(num_steps):
        next(steps)
    dist.barrier(barriers)
    return time.perf_counter() - started
