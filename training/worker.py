"""One rank: forked by its agent's zygote, told all by one order, dead when either of them dies."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from training.control import EXIT_STOPPED, Channel, Note
from training.documents import parse
from training.errors import UnbrokenError
from training.job import Job
from training.slots import Slots

if TYPE_CHECKING:
    from training.handover import Handover

BEAT_SECONDS = 0.25


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
    control_fd: int = -1
    """This worker's end of the socket between it and its agent (training.control)."""
    maybe_listen_fd: int | None = None
    """Only for rank 0: the socket that the agent bound for the group's store."""
    slot_fd_0: int = -1
    slot_fd_1: int = -1
    """Where state is left and found (training.slots)."""


def run(document: dict[str, Any]) -> int:
    """Train as the order says. Returns the exit code, with which the caller ends this process at once."""
    order = parse(WorkerOrder, document)
    from training.handover import GroupEnded, Handover

    slots = Slots([order.slot_fd_0, order.slot_fd_1])
    handover = Handover(slots, run_key=order.job["key"], generation=order.job["generation"])
    channel = Channel(socket.socket(fileno=order.control_fd))
    for target in (_obey, _beat):
        threading.Thread(target=target, args=(channel, handover), name="control", daemon=True).start()
    try:
        _train(order, handover, channel.send)
    except GroupEnded:
        return EXIT_STOPPED
    except Exception as error:  # the agent decides what it means; no more collectives after an error
        handover.leave()
        _report(error, channel, handover.step)
        return error.exit_code if isinstance(error, UnbrokenError) else 1
    return 0


def _report(error: Exception, channel: Channel, step: int) -> None:
    if _class_name(error) == "Exception":
        traceback.print_exc()
    with suppress(OSError):
        message = str(error) or repr(error)
        channel.send(Note(event="failed", class_name=_class_name(error), message=message, step=step))
    sys.stdout.flush()
    sys.stderr.flush()


def _beat(channel: Channel, handover: Handover) -> None:
    """Tell the agent that this process lives, and whether it waits for others."""
    with suppress(OSError):
        while True:
            channel.send(Note(event="beat", step=handover.step, is_waiting=handover.is_waiting))
            time.sleep(BEAT_SECONDS)


def _obey(channel: Channel, handover: Handover) -> None:
    """What the agent says, until it is gone: then this process goes too."""
    with suppress(EOFError, OSError):
        while True:
            for order in channel.orders():
                if order.do == "stop":
                    handover.leave()
                    os._exit(EXIT_STOPPED)
                handover.take_order(order)
    os._exit(1)


def _class_name(error: Exception) -> str:
    """The class that says who must act; errors of the group's collectives say only that a peer is gone."""
    if isinstance(error, UnbrokenError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == UnbrokenError.__module__)
    import torch.distributed as dist

    peer_is_gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
    return "PeerLost" if peer_is_gone else "Exception"


def _train(order: WorkerOrder, handover: Handover, tell: Callable[[Note], None]) -> None:
    from training.rank import Seat, train

    seat = Seat(rank=order.rank, local_rank=order.local_rank, world_size=order.world_size, token=order.token)
    train(Job.from_json(order.job), seat, _rendezvous(order), handover, tell)


def _rendezvous(order: WorkerOrder) -> Any:
    """The group's own store, on the one socket that its first node's agent bound; and in it a corner of its token's
    own, as an agent that never learnt that it was named offers the same socket again."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not listed

    is_master = order.maybe_listen_fd is not None
    store = TCPStore(
        order.store_address,
        order.store_port,
        world_size=order.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=order.maybe_listen_fd,
    )
    return PrefixStore(str(order.token), store)
