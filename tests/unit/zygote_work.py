"""What workers do in the tests of the zygote. Imported by the zygote itself: no torch, no fixtures, no assertions."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import threading
import time
from typing import Any


def work(order: dict[str, Any]) -> int:
    """Says what it sees to the descriptor that it was handed, and does what it is told."""
    started = time.monotonic_ns()
    if "say_fd" in order:
        os.write(order["say_fd"], json.dumps({**_seen(order), "started": started}).encode() + b"\n")
    if "copy_fds" in order:
        source, target = order["copy_fds"]
        os.write(target, os.read(source, 100))
    if order.get("sleeps"):
        time.sleep(600)
    if order.get("raises"):
        raise RuntimeError("as ordered")
    if order.get("exits") is not None:
        sys.exit(order["exits"])
    return int(order.get("code", 0))


def _seen(order: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    seen = {
        "order": order,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "fds": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in _open_fds()),
        "num_threads": threading.active_count(),
        "torch_is_there": "torch" in sys.modules,
        "random": [random.random(), float(np.random.rand()), multiprocessing.current_process().authkey.hex()],
    }
    recipe = order.get("recipe")
    if recipe is not None:
        seen["was_preloaded"] = recipe in sys.modules
        seen["answer"] = getattr(sys.modules.get(recipe), "ANSWER", None)
    return seen


def _open_fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}") or _is_anonymous(fd)]


def _is_anonymous(fd: str) -> bool:
    try:
        return not os.readlink(f"/proc/self/fd/{fd}").startswith("/proc")
    except OSError:
        return False


def train_and_list_imports(order: dict[str, Any]) -> int:
    """Train as a worker does, and write down which modules were imported for that after the fork."""
    from training.cluster import worker

    before = set(sys.modules)
    code = worker.run(order)
    with open(os.environ["IMPORTS_PATH"], "w") as file:
        json.dump(sorted(set(sys.modules) - before), file)
    return code


def form_group(order: dict[str, Any]) -> int:
    """A group of one rank, and the time when it was there."""
    import torch.distributed as dist

    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not listed
        "127.0.0.1", order["port"], world_size=1, is_master=True, master_listen_fd=order["listen_fd"]
    )
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    os.write(order["say_fd"], json.dumps({"formed": time.monotonic_ns()}).encode() + b"\n")
    return 0
