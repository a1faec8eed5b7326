"""Processes that wait for lines, and stand still between them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environments import ROOT

LOOPBACK_INTERFACE = "lo"


class Processes:
    """Of one contestant. The first of them are told what to do, and each replies with a line of JSON."""

    def __init__(self, command: Sequence[str], *, num_asked: int, num_processes: int | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="unbroken-bench-")
        self._num_asked = num_asked
        self._log = Path(self._folder.name) / "log"
        environment = {
            **os.environ,
            "RENDEZVOUS": str(Path(self._folder.name) / "rendezvous"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
            "TP_SOCKET_IFNAME": LOOPBACK_INTERFACE,
            "PYTHONPATH": str(ROOT),
        }
        with self._log.open("a") as log:
            self.all = [
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for rank in range(num_processes or num_asked)
            ]

    @property
    def asked(self) -> Sequence[subprocess.Popen[str]]:
        return self.all[: self._num_asked]

    def ask(self, line: str) -> list[Any]:
        """What each replies. Meanwhile they run; some that wait would take a core from others (torch RPC's poll)."""
        self.tell(line)
        replies = [process.stdout.readline() for process in self.asked if process.stdout]
        if not all(replies):
            raise SystemExit(f"a process of {self.all[0].args!r} died:\n{self.log()}")
        self._signal(signal.SIGSTOP)
        return [json.loads(reply) for reply in replies]

    def tell(self, line: str) -> None:
        self._signal(signal.SIGCONT)
        for process in self.asked:
            assert process.stdin is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def _signal(self, number: signal.Signals) -> None:
        for process in self.all:
            process.send_signal(number)

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> None:
        for process in self.all:
            process.kill()
            process.wait()
        self._folder.cleanup()
