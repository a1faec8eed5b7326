"""`python -m benchmarks.scale.agent NODE KEY JOB`: the node agent's own code, but for three things.

Its workers are stand-ins (stand_in.py), its messages are counted on a board that the bench reads at any moment, and
its beat is as the environment says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from training.cluster import agent
from training.cluster.links import Links
from training.cluster.protocol import Status, Timing
from training.config import Preset
from training.documents import canonical_json

BOARD, BEAT_SECONDS = "SCALE_BOARD", "SCALE_BEAT_SECONDS"
PROOF_BYTES = 66
"""Of each message, beside its JSON (training.cluster.links)."""


class Row(NamedTuple):
    """What the agents of a node say of themselves; all but the last since the first of them began."""

    num_told: int
    """Messages to single peers."""
    num_told_bytes: int
    num_heard: int
    token: int
    """Of the group that it trains in; 0 if it does not."""


class Board:
    """A row of numbers for each node, in a file that all map into their memory."""

    def __init__(self, path: Path, num_nodes: int | None = None) -> None:
        if num_nodes is not None:
            path.write_bytes(bytes(8 * len(Row._fields) * num_nodes))
        with path.open("r+b") as file:
            self._cells = memoryview(mmap(file.fileno(), 0)).cast("q")

    def __getitem__(self, node: int) -> Row:
        start = node * len(Row._fields)
        return Row(*self._cells[start : start + len(Row._fields)])

    def __setitem__(self, node: int, row: Row) -> None:
        for number, value in enumerate(row):
            self._cells[node * len(Row._fields) + number] = value


class CountedLinks(Links):
    """Tells as its parent does, and notes it."""

    def __init__(self, incarnation: str, **about: Any) -> None:
        super().__init__(incarnation, **about)
        self._board, self._node = Board(Path(os.environ[BOARD])), int(sys.argv[1])
        self._board[self._node] = self._board[self._node]._replace(token=0)  # that of the agent before

    def tell(self, status: Status) -> None:
        body = canonical_json(asdict(status))
        for connections in self._open.values():
            connections[-1].send(body)
        row, num_peers = self._board[self._node], len(self._open)
        self._board[self._node] = row._replace(
            num_told=row.num_told + num_peers,
            num_told_bytes=row.num_told_bytes + num_peers * (len(body) + PROOF_BYTES),
            token=status.token if status.phase == "training" else 0,
        )

    def _hear(self, peer: str, document: dict[str, object]) -> None:
        super()._hear(peer, document)
        row = self._board[self._node]
        self._board[self._node] = row._replace(num_heard=row.num_heard + 1)


class StandIn:
    """A process that stands in for a worker."""

    def __init__(self, control_fd: int) -> None:
        script = Path(__file__).with_name("stand_in.py")
        self._popen = subprocess.Popen([sys.executable, "-I", "-S", script, str(control_fd)], pass_fds=(control_fd,))
        self._pidfd = os.pidfd_open(self._popen.pid)

    def fileno(self) -> int:
        return self._pidfd

    def poll(self) -> int | None:
        return self._popen.poll()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class StandInZygote:
    """Always warm."""

    def __init__(self, preset: Preset) -> None:
        pass

    def prepare(self) -> None:
        pass

    def is_ready(self) -> bool:
        return True

    def start(self, order: Mapping[str, Any], fds: Mapping[str, int]) -> StandIn:
        return StandIn(fds["control_fd"])


def main() -> None:
    timing = partial(Timing, beat=float(os.environ[BEAT_SECONDS]))
    with (
        patch.object(agent, "Links", CountedLinks),
        patch.object(agent, "Zygote", StandInZygote),
        patch.object(agent, "Timing", timing),
    ):
        agent.main()


if __name__ == "__main__":
    main()
