"""A replica in a rank's process, and how it outlives that: what it has is left as bytes, for the process that comes in
its place."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence

from training.servers.arithmetic import TensorState
from training.servers.endpoints import Begun, Server, serve, wake
from training.servers.mesh import Mesh
from training.servers.protocol import Copy, Left
from training.servers.replica import Replica
from training.servers.wire import decode_from, encode

FREEZE_SECONDS = 1.0
"""After which a replica that is in the midst of something leaves nothing."""


class Served:
    """A server's state machine, with the thread that serves it."""

    def __init__(self, mesh: Mesh, server: Server, on_trouble: Callable[[int, Exception | None], None]) -> None:
        """`on_trouble` is that of `serve`."""
        self.mesh = mesh
        self._changes: queue.SimpleQueue[Begun | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        arguments = (mesh, server, self._changes, on_trouble, self._lock)
        threading.Thread(target=serve, args=arguments, name=mesh.name, daemon=True).start()

    def tell(self, maybe_begun: Begun | None) -> None:
        self._changes.put(maybe_begun)
        wake(self.mesh)

    def close(self) -> None:
        self.tell(None)
        self.mesh.close()


class Hosted(Served):
    """A replica, which can be left."""

    def __init__(
        self, mesh: Mesh, replica: Replica, state: TensorState, on_trouble: Callable[[int, Exception | None], None]
    ) -> None:
        """`state` is the replica's."""
        self.replica = replica
        self._state = state
        super().__init__(mesh, replica, on_trouble)

    def num_bytes(self) -> int:
        """Of what it would leave, about."""
        return self._state.num_bytes()

    def maybe_last_copy(self) -> Copy | None:
        """All that it has, if it has anything. It says nothing to anybody any more: no step may count as done by what
        is not in there."""
        is_frozen = self._lock.acquire(timeout=FREEZE_SECONDS)  # for ever
        return self.replica.copy() if is_frozen and self.replica.position >= 0 else None


def leave(hosted: Mapping[int, Hosted]) -> Sequence[memoryview]:
    """What these replicas have, as bytes for `left_copies`. This process must end then."""
    copies = {shard: copy for shard, one in hosted.items() if (copy := one.maybe_last_copy()) is not None}
    head, tensors = encode(Left(token=0, copies=copies))
    return [memoryview(head), *tensors]


def left_copies(data: memoryview) -> Mapping[int, Copy]:
    message = decode_from(data)
    assert isinstance(message, Left), "what `leave` gave"
    return message.copies
