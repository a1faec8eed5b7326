"""What the bench asks of a contestant, one JSON line each way; every task runs in freshly forked processes.

The libraries are imported once, before the fork: neither imports nor the start of processes are timed.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.data.records import KINDS, Batch, Kind, checksum

BATCH_SIZE = 64
SEED = 7
START_SECONDS = 60
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement."""

    action: str
    """`write` or `read`."""
    kind_name: str
    source: str
    """The folder of raw files."""
    bucket: str
    scratch: str
    """An empty folder, for caches."""
    chunk_bytes: int
    """How large a peer's shards are to be."""
    num_processes: int = 1
    shuffled: bool = False
    checked: bool = False
    """Whether to keep all batches and checksum them when the clock has stopped."""

    @property
    def kind(self) -> Kind:
        return KINDS[self.kind_name]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one task took and gave."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    num_samples: int = 0
    id_sum: int = 0
    content: int = 0
    error: str = ""


Write = Callable[[Task], Callable[[], None]]
Read = Callable[[Task, int], Callable[[], Iterable[Batch]]]
"""Both prepare, untimed (rank given for `Read`), and return what is timed."""


def serve(write: Write, read: Read) -> None:
    """Answer tasks from stdin until it closes. What libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        outcome = _run(Task(**json.loads(line)), write, read)
        replies.write(json.dumps(asdict(outcome)) + "\n")
        replies.flush()


def stack(rows: list[dict[str, Any]]) -> Batch:
    """A batch of samples: what peers are given as their `collate_fn`."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _run(task: Task, write: Write, read: Read) -> Outcome:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(task.num_processes)
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    results = context.SimpleQueue()
    gc.freeze()

    def member(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "GLOBAL_RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(task.num_processes), "LOCAL_WORLD_SIZE": str(task.num_processes)}
        try:
            work = write(task) if task.action == "write" else read(task, rank)
            barrier.wait(START_SECONDS)
            results.put(_timed(work, task))
        except BaseException as error:
            barrier.abort()
            results.put({"error": f"{type(error).__name__}: {error}"[:300]})
            raise

    members = [context.Process(target=member, args=(rank,)) for rank in range(task.num_processes)]
    for process in members:
        process.start()
    found = [results.get() for _ in members]
    for process in members:
        process.join()
    return _together(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _timed(work: Callable[[], Iterable[Batch] | None], task: Task) -> dict[str, Any]:
    kept: list[Batch] = []
    num_samples = id_sum = 0
    cpu, start = _cpu_seconds(), time.monotonic()
    for batch in work() or ():
        num_samples += len(batch["id"])
        id_sum += int(batch["id"].sum())
        if task.checked:
            kept.append(batch)
    end, cpu = time.monotonic(), _cpu_seconds() - cpu
    content = sum(checksum(batch) for batch in kept)
    return {"start": start, "end": end, "cpu": cpu, "num": num_samples, "id_sum": id_sum, "content": content}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _together(found: list[dict[str, Any]]) -> Outcome:
    errors = [each["error"] for each in found if "error" in each]
    if errors:
        return Outcome(error=next((e for e in errors if not e.startswith("BrokenBarrier")), errors[0]))
    return Outcome(
        seconds=max(each["end"] for each in found) - min(each["start"] for each in found),
        cpu_seconds=sum(each["cpu"] for each in found),
        num_samples=sum(each["num"] for each in found),
        id_sum=sum(each["id_sum"] for each in found),
        content=sum(each["content"] for each in found) % 2**64,
    )
