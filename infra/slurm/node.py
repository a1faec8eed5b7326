"""One node of a run, as Slurm starts it: it keeps an agent until that is done, and is requeued if preempted.

Exit codes: the agent's. Nothing is done, with success, if another array trains the run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import psutil

from infra.restarts import EXIT_GIVEN_UP, FINAL_CODES, NUM_STARTS_BEFORE_GIVING_UP, pause_seconds, quick_series
from infra.slurm.claims import read_claim
from infra.slurm.commands import Commands
from training.cluster.agent import EXIT_PREEMPTED
from training.errors import InfrastructureError, UserError
from training.patience import ask_until
from training.runs.job import location_from
from training.s3.objectstore import Store

T = TypeVar("T")
PATIENCE_SECONDS, PAUSE_SECONDS = 600.0, 2.0
COMMANDS = "UNBROKEN_SLURM_COMMANDS"
"""The folder of Slurm's commands on the nodes, if they are not on PATH."""


def main() -> None:
    """`python -m infra.slurm.node KEY COMMAND…`"""
    key, command = sys.argv[1], sys.argv[2:]
    job_id, node = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
    location = location_from(os.environ)
    assert location is not None, "whoever submits says where the store is"
    store = Store(location)
    claim = patiently(lambda: read_claim(store, key))
    if claim.job_id != job_id:
        ours = f"job {claim.job_id} trains it" if claim.job_id else "it was cancelled"
        _say(f"job {job_id} has nothing to do for run {key[:12]}: {ours}")
        sys.exit(0)
    commands = Commands.at(os.environ.get(COMMANDS, ""))
    job = Job(commands=commands, name=f"{job_id}_{node}")
    command = [part.replace("{node}", node) for part in command]
    place = patiently(lambda: place_of(commands, os.environ["SLURMD_NODENAME"]))
    code = Keeper(command=command, environment=place, is_cancelled=job.is_cancelled).run()
    if code == EXIT_PREEMPTED and not job.is_cancelled():
        job.requeue()
    sys.exit(code)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What Slurm knows of this node's own job."""

    commands: Commands
    name: str

    def is_cancelled(self) -> bool:
        """By somebody who wants no more of it. Else its node is wanted for another, or its time is up; or nobody knows,
        and then a last checkpoint does no harm."""
        try:
            words = self.commands.run("scontrol", "--oneliner", "show", "job", self.name).split()
        except InfrastructureError as error:
            _say(str(error))
            return False
        return "JobState=RUNNING" not in words and "Reason=TimeLimit" not in words

    def requeue(self) -> None:
        """By itself: what ends within the grace time that Slurm gives counts as failed, and is not requeued."""
        _say(f"preempted: job {self.name} is requeued")
        patiently(lambda: self.commands.run("scontrol", "requeue", self.name))


class Keeper:
    """Starts the agent, and again if it dies."""

    def __init__(
        self, *, command: Sequence[str], environment: Mapping[str, str], is_cancelled: Callable[[], bool]
    ) -> None:
        self._command = command
        self._is_cancelled = is_cancelled
        self._environment = {**os.environ, **environment}
        self._maybe_running: subprocess.Popen[bytes] | None = None
        self._is_to_leave = False
        signal.signal(signal.SIGTERM, self._pass_on)

    def run(self) -> int:
        """The agent's last exit code."""
        starts: list[float] = []
        while not self._is_to_leave:
            series = quick_series(starts, time.time())
            if len(series) >= NUM_STARTS_BEFORE_GIVING_UP:
                _say(f"the agent died {len(series)} times in a row soon after its start: given up")
                return EXIT_GIVEN_UP
            time.sleep(pause_seconds(len(series)))
            starts = [*series, time.time()]
            code = self._run_once()
            if code in (*FINAL_CODES, EXIT_PREEMPTED):
                return code
            _say(f"the agent ended with {code}: it is started again")
        return EXIT_PREEMPTED

    def _run_once(self) -> int:
        self._maybe_running = subprocess.Popen(self._command, env=self._environment)
        if self._is_to_leave:  # it was told before there was anybody to tell
            self._maybe_running.terminate()
        return self._maybe_running.wait()

    def _pass_on(self, number: int, frame: object) -> None:
        """The agent leaves in good order, unless nobody wants its work."""
        self._is_to_leave = True
        if self._maybe_running is not None:
            stop = self._maybe_running.kill if self._is_cancelled() else self._maybe_running.terminate
            stop()


def place_of(commands: Commands, node: str) -> dict[str, str]:
    """Where the other nodes reach this one: the address that Slurm knows it by, and the interface that has it.

    Raises `UserError` if Slurm knows no address of this machine's.
    """
    about = commands.run("scontrol", "--oneliner", "show", "node", node)
    named = next((word for word in about.split() if word.startswith("NodeAddr=")), "").removeprefix("NodeAddr=")
    try:
        address = socket.gethostbyname(named)
    except (OSError, UnicodeError) as error:
        raise UserError(f"Slurm's NodeAddr of {node}, {named!r}, is no address: {error}") from error
    interfaces = psutil.net_if_addrs().items()
    interface = next((name for name, found in interfaces if any(entry.address == address for entry in found)), None)
    if interface is None:
        raise UserError(f"Slurm's NodeAddr of {node}, {named!r}, is {address}, which no interface of this machine has")
    return {"UNBROKEN_NODE_ADDRESS": address, "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def patiently(ask: Callable[[], T]) -> T:
    """The controller or the store may be away just now, and what ends for that is not started again. Raises
    `InfrastructureError` if it stays away."""
    return ask_until(
        ask,
        seconds=PATIENCE_SECONDS,
        pause_seconds=PAUSE_SECONDS,
        errors=(InfrastructureError,),
        tell=lambda error: _say(str(error)),
    )


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    main()
