"""What the workers of the handover's tests do: real ones, over samples in memory, that wait where a test says so.

Imported by the zygote: no fixtures, no assertions.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from tests.unit.tiny import MemoryFeed, tiny_reader
from training import rank, sharded_loop
from training.cluster import worker
from training.config import Preset
from training.control import Order
from training.loop import Trainer
from training.memory import copies
from training.memory.handover import Handover
from training.servers import hosted, mesh
from training.servers.client import Client
from training.servers.colocated import Colocated
from training.servers.protocol import Values
from training.servers.replica import Replica

FORMING = "as its group begins, before it has a state"
MID_STEP = "in the midst of the step after"
VALIDATING = "before validation"
VALIDATED = "after validation, before it is noted"
UPDATING = "in the update to the step after"
COPYING = "before its copies are written"
APPLIED = "once a shard's primary has applied it, and told nobody"
PUSHING = "in the step after, when all shards have their part but for the first"
PULLING = "in the step after, when the first shard's parameters come, and all others are on their way"


def run(order: dict[str, Any]) -> int:
    """A worker of training.cluster.worker, which says when it comes to the place and step of its order's pauses, and
    when it has taken note of an order then."""
    _feed_from_memory()
    _be_patient(order["patience_seconds"])
    if order["is_far"]:
        sharded_loop.distance = lambda layout, _: copies.distance(layout, 1)
    if "pause_fd" in order:
        _pause_at(order["place"], order["step"], socket.socket(fileno=order["pause_fd"]))
    return worker.run(order)


def _feed_from_memory() -> None:
    def feed(*, preset: Preset, **_: object) -> MemoryFeed:
        return MemoryFeed(tiny_reader(), preset)

    rank.Feed = feed  # type: ignore[misc, assignment]  # this process ends with the test


def _be_patient(seconds: float) -> None:
    """With what is slow and no more than that. This process ends with the test."""
    worker.PATIENCE_SECONDS = worker.PATIENCE_WITH_SERVERS_SECONDS = seconds
    hosted.FREEZE_SECONDS = mesh.HANDSHAKE_SECONDS = 100.0


def _pause_at(place: str, step: int, test: socket.socket) -> None:
    owner, name = {
        FORMING: (Trainer, "begin_reading"),
        MID_STEP: (Trainer, "microbatch"),
        UPDATING: (Trainer, "update"),
        VALIDATING: (Trainer, "validate"),
        VALIDATED: (Handover, "complete"),
        COPYING: (Handover, "put_copy"),
        APPLIED: (Replica, "_tell_backups"),
        PUSHING: (Colocated, "push"),
        PULLING: (Client, "handle"),
    }[place]
    go_on: Callable[..., Any] = getattr(owner, name)

    def pause(self: Any, *arguments: Any, **values: Any) -> Any:
        nonlocal step
        if _maybe_reached(self, arguments) == step:
            step = -1
            test.sendall(b"!")
            test.recv(1)
        return go_on(self, *arguments, **values)

    setattr(owner, name, pause)
    take_order = Handover.take_order

    def take_and_tell(self: Handover, order: Order) -> None:
        take_order(self, order)
        test.sendall(b"o")

    Handover.take_order = take_and_tell  # type: ignore[method-assign]


def _maybe_reached(caller: Any, arguments: tuple[Any, ...]) -> int | None:
    """The last finished step, if this is the place."""
    if isinstance(caller, Colocated):
        step, shard, *_ = arguments
        return step - 1 if shard == 0 else None
    if isinstance(caller, Client):
        _, message = arguments
        return message.step - 1 if caller.phase == "applying" and isinstance(message, Values) else None
    reached: int = caller.step if isinstance(caller, Handover) else caller.state.step
    return reached
