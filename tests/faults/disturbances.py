"""What may befall a pipeline run from without: each process and each server of the stack, and its disk."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from xmlrpc.client import Fault

import psutil

from infra.local import supervisor
from tests.conftest import Stack
from tests.faults.injectors import Kill, Lasting, Stop, agent, rank
from tests.faults.machine import FullDisk
from tests.flows.runs import processes
from tests.infra.probes import is_alive
from tests.waiting import wait_until

MIN_AWAY_SECONDS, MAX_AWAY_SECONDS = 3.0, 12.0
SERVERS = ("s3", "mlflow", "prefect")
NOT_THERE = (OSError, HTTPException, Fault)
"""What a call of a supervisor raises that is dead, or begins."""


def zygote() -> Kill:
    return Kill("zygote", lambda stack: processes(stack, "training.cluster.zygote"))


def flow() -> Kill:
    return Kill("flow", lambda stack: processes(stack, "prefect.engine"))


def head() -> Kill:
    def find(stack: Stack) -> list[psutil.Process]:
        maybe = supervisor.supervisor_process(stack.home)
        return [maybe] if maybe else []

    return Kill("supervisord", find)


def command(pid: int) -> Kill:
    """`unbroken run` itself."""
    return Kill("command", lambda stack: [psutil.Process(pid)] if is_alive(pid) else [])


def service(name: str) -> Kill:
    """Its supervisor, which may be dead itself, restarts it."""
    return Kill(name, lambda stack: _server(stack, name)[:1])


def kills(pid: int) -> list[Kill]:
    """One of each process of the stack, and of the run that `pid` is the command of."""
    services = [service(name) for name in (*SERVERS, "worker", "reaper", "keeper")]
    return [*services, head(), flow(), agent(), rank(), zygote(), command(pid)]


@dataclass
class Away:
    """A fault of the stack that lasts a while."""

    name: str
    make: Callable[[Stack], Lasting | None]
    """None as long as there is nothing that it could strike."""
    maybe_fault: Lasting | None = field(default=None, init=False)

    def fire(self, stack: Stack, chance: random.Random) -> None:
        self.maybe_fault = self.make(stack)
        if self.maybe_fault is not None:
            self.maybe_fault.fire()

    def heal(self) -> None:
        if self.maybe_fault is not None:
            self.maybe_fault.heal()

    @property
    def fired(self) -> bool:
        return self.maybe_fault is not None and self.maybe_fault.fired


class Stopped(Lasting):
    """A server that its supervisor stops, and starts again: whoever calls it is refused."""

    def __init__(self, stack: Stack, name: str) -> None:
        self._stack = stack
        self._name = name
        self._is_stopped = False

    def fire(self) -> None:
        remote = supervisor.remote(self._stack.home)
        remote.stopProcess(self._name)
        self._is_stopped = remote.getProcessInfo(self._name)["pid"] == 0

    def heal(self) -> None:
        wait_until(self._runs, what=f"{self._name} to be started again")

    def _runs(self) -> bool:
        """Not before the supervisor does, which may have been killed meanwhile."""
        with contextlib.suppress(*NOT_THERE):
            remote = supervisor.remote(self._stack.home)
            with contextlib.suppress(Fault):  # it is started already
                remote.startProcess(self._name, False)
            return bool(remote.getProcessInfo(self._name)["pid"])
        return False

    @property
    def fired(self) -> bool:
        return self._is_stopped


def stopped(name: str) -> Away:
    return Away(f"{name} stopped", lambda stack: Stopped(stack, name) if _server(stack, name) else None)


def frozen(name: str) -> Away:
    """It takes connections, and says nothing."""

    def make(stack: Stack) -> Lasting | None:
        found = _server(stack, name)
        return Stop(found) if found else None

    return Away(f"{name} frozen", make)


def full_disk() -> Away:
    """Of a stack whose home is a small disk."""
    return Away("disk full", lambda stack: FullDisk(stack.home))


def outages(*, with_disk: bool) -> list[Away]:
    """One of each."""
    found = [make(name) for name in SERVERS for make in (stopped, frozen)]
    return [*found, full_disk()] if with_disk else found


def _server(stack: Stack, name: str) -> list[psutil.Process]:
    """A service's process and all its children; none while it is not there."""
    with contextlib.suppress(psutil.NoSuchProcess, *NOT_THERE):
        pid = supervisor.remote(stack.home).getProcessInfo(name)["pid"]
        if pid:
            found = psutil.Process(pid)
            return [found, *found.children(recursive=True)]
    return []
