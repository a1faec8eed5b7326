"""Ranks of a bench: fresh processes that meet, do one thing, and each print what they found as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.environments import ROOT
from benchmarks.parallel.work import TIMEOUT


def answers_of(module: str, *arguments: object, num_ranks: int, **variables: str) -> list[Any]:
    """What each rank prints; with more environment variables."""
    with tempfile.TemporaryDirectory(prefix="unbroken-bench-") as folder:
        environment: Mapping[str, str] = {
            **os.environ,
            "RENDEZVOUS": str(Path(folder) / "rendezvous"),
            "WORLD_SIZE": str(num_ranks),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
            **variables,
        }
        command = [sys.executable, "-m", f"benchmarks.parallel.{module}", *map(str, arguments)]
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
            for rank in range(num_ranks)
        ]
        answers = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{module} {' '.join(map(str, arguments))}: a rank failed")
    return [json.loads(answer) for answer in answers]


def meet() -> int:
    """In such a process: join the others. Returns the rank."""
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["RENDEZVOUS"], world_size)  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return rank


def answer(found: object) -> None:
    """Print it and end, with the others."""
    print(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch's own goodbye takes seconds
