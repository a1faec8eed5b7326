"""A replica in a rank's process, and how it outlives that: what it has is left as bytes, for the process that comes in
its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from training.servers.arithmetic import TensorState
from training.servers.endpoints import Server
from training.servers.mesh import Mesh
from training.servers.protocol import Copy, Left
from training.servers.replica import Replica
from training.servers.wire import decode_from, encode

FREEZE_SECONDS = 1.0
"""After which a replica that is in the midst of something leaves nothing."""


class Hosted(Server):
    """A replica, which can be left."""

    def __init__(
        self, mesh: Mesh, replica: Replica, state: TensorState, on_trouble: Callable[[int, Exception | None], None]
    ) -> None:
        """`state` is the replica's."""
        super().__init__(mesh, replica, on_trouble)
        self.replica = replica
        self._state = state

    def num_bytes(self) -> int:
        """Of what it would leave, about."""
        return self._state.num_bytes()

    def maybe_last_copy(self) -> Copy | None:
        """All that it has, if it has anything. It says nothing to anybody any more: no step may count as done by what
        is not in there."""
        is_frozen = self.freeze(timeout_seconds=FREEZE_SECONDS)
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
