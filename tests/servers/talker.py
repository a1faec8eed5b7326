"""`python -m tests.servers.talker NAME HOST PORT`: says one long message after another to whoever listens there, until
it stops in the midst of one, for ever."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch

from training.servers import mesh as mesh_module
from training.servers import streams
from training.servers.mesh import Mesh
from training.servers.outbox import MAX_AT_ONCE_BYTES
from training.servers.protocol import Hold, Send
from training.servers.shared import Segment

NUM_WHOLE = 5
NUM_ELEMENTS = MAX_AT_ONCE_BYTES // 4 + 1
"""More than is said by whoever has it: one thread says all, and is interrupted."""
TOKEN = 3


def stop() -> None:
    print("half", flush=True)
    threading.Event().wait()


def stop_in_the_midst(of_message: int) -> None:
    """Of a copy into memory, or by a socket."""
    num_filled = num_sent = 0
    fill, send_all = Segment.fill, streams.send_all

    def fill_half(self: Segment, buffers: Sequence[memoryview]) -> None:
        nonlocal num_filled
        num_filled += 1
        if num_filled == of_message:
            fill(self, [buffer[: len(buffer) // 2] for buffer in buffers])
            stop()
        fill(self, buffers)

    def send_half(connection: Any, buffers: Sequence[Any], descriptors: Sequence[int] = ()) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent == of_message:
            *heads, body = buffers
            send_all(connection, [*heads, body[: len(body) // 2]])
            stop()
        send_all(connection, buffers, descriptors)

    Segment.fill = fill_half  # type: ignore[method-assign]  # this process ends with the test
    streams.send_all = send_half  # messages in shared memory have their own reference to it


def main() -> None:
    name, host, port = sys.argv[1:]
    mesh_module.HANDSHAKE_SECONDS = 100.0  # who is slow is not lost
    stop_in_the_midst(of_message=NUM_WHOLE + 1)
    mesh = Mesh("talker", secret="known", address="127.0.0.1", max_bytes=1)
    mesh.begin(TOKEN, {name: (host, int(port))})
    for step in range(NUM_WHOLE + 1):
        mesh.send([Send(to=name, message=Hold(token=TOKEN, step=step, total=torch.full([NUM_ELEMENTS], float(step))))])
    threading.Event().wait()


if __name__ == "__main__":
    main()
