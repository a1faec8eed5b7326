"""Stands in for a rank: `python -I -S stand_in.py DESCRIPTOR`, and nothing but the standard library.

It says and obeys what a worker does on its agent's socket (training.control). It meets no other rank, computes nothing,
holds no state, and writes nothing to the store.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys

BEAT_SECONDS = 0.25  # as training.cluster.worker
MAX_BYTES = 1 << 22


def main() -> None:
    end = socket.socket(fileno=int(sys.argv[1]))
    rest, is_in = b"", False
    while True:
        readable, _, _ = select.select([end], [], [], BEAT_SECONDS)
        if not readable:
            if is_in:
                _say(end, "beat")
            continue
        data, descriptors, _, _ = socket.recv_fds(end, MAX_BYTES, 8)
        if not data:
            return  # the agent is gone
        for descriptor in descriptors:
            os.close(descriptor)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            is_called = json.loads(line)["do"] == "join"
            if is_called or is_in:
                _say(end, "began" if is_called else "left")
            is_in = is_called


def _say(end: socket.socket, event: str) -> None:
    end.sendall(json.dumps({"event": event, "step": 0, "is_waiting": True}).encode() + b"\n")


if __name__ == "__main__":
    main()
