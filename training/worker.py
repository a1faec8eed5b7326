"""One rank: forked by its node's zygote (or started with its order on standard input), dead when that one dies."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from training.documents import canonical_json, parse
from training.errors import UnbrokenError
from training.job import Job
from training.processes import die_with


@dataclass(frozen=True, kw_only=True)
class WorkerOrder:
    """What the agent tells a worker."""

    job: dict[str, Any]
    token: int
    rank: int
    local_rank: int
    world_size: int
    store_address: str
    store_port: int
    maybe_listen_fd: int | None
    """Only for rank 0: the socket that the agent bound for the group's store."""
    report_path: str
    """Where to say why it failed."""
    agent_pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Why a worker failed."""

    class_name: str
    message: str
    step: int


def main() -> None:
    """`python -m training.worker`: a worker without a zygote."""
    order = json.loads(sys.stdin.readline())
    die_with(order["agent_pid"])
    os._exit(run(order))  # the group's threads need no goodbye


def run(document: dict[str, Any]) -> int:
    """Train as the order says. Returns the exit code, with which the caller ends this process at once."""
    order = parse(WorkerOrder, document)
    step = [0]
    try:
        _train(order, step)
    except Exception as error:  # the agent decides what it means; no more collectives after an error
        if not isinstance(error, UnbrokenError):
            traceback.print_exc()
        report = WorkerReport(class_name=_class_name(error), message=str(error) or repr(error), step=step[0])
        Path(order.report_path).write_bytes(canonical_json(asdict(report)))
        sys.stdout.flush()
        sys.stderr.flush()
        return error.exit_code if isinstance(error, UnbrokenError) else 1
    return 0


def _class_name(error: Exception) -> str:
    """The class that says who must act; errors of the group's collectives say only that a peer is gone."""
    if isinstance(error, UnbrokenError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == UnbrokenError.__module__)
    import torch.distributed as dist

    peer_is_gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
    return "PeerLost" if peer_is_gone else "Exception"


def _train(order: WorkerOrder, step: list[int]) -> None:
    from training.rank import Seat, train

    seat = Seat(rank=order.rank, local_rank=order.local_rank, world_size=order.world_size, token=order.token)
    train(Job.from_json(order.job), seat, _rendezvous(order), step)


def _rendezvous(order: WorkerOrder) -> Any:
    """The group's own store, on the one socket that its first node's agent bound."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed

    is_master = order.maybe_listen_fd is not None
    return TCPStore(
        order.store_address,
        order.store_port,
        world_size=order.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=order.maybe_listen_fd,
    )


if __name__ == "__main__":
    main()
