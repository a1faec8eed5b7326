"""Faults as objects. Each says whether it fired: a test of a fault that never happened proves nothing."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

from infra.local import supervisor
from tests.conftest import Stack
from tests.flows.runs import processes
from tests.infra.probes import is_alive
from tests.waiting import wait_until


class Lasting:
    """A fault that lasts until it is healed; as a context, for as long as that."""

    def fire(self) -> None:
        raise NotImplementedError

    def heal(self) -> None:
        raise NotImplementedError

    @property
    def fired(self) -> bool:
        """Whether something was seen to suffer from it."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.fire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.heal()


@dataclass
class Kill:
    """`kill -9` of one process, chosen at random among those that `find` gives."""

    name: str
    find: Callable[[Stack], list[psutil.Process]]
    num_killed: int = field(default=0, init=False)

    def fire(self, stack: Stack, chance: random.Random) -> None:
        victims = sorted(self.find(stack), key=lambda process: process.pid)
        if not victims:
            return
        victim = chance.choice(victims)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()  # a child of ours stays, to be asked for its exit code
            wait_until(lambda: not is_alive(victim.pid), what="the process to be dead")
            self.num_killed += 1

    @property
    def fired(self) -> bool:
        return self.num_killed > 0


@dataclass
class KillProcess:
    """`kill -9` of this very process."""

    victim: psutil.Process
    num_killed: int = field(default=0, init=False)

    def fire(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.victim.kill()
            wait_until(lambda: not is_alive(self.victim.pid), what="the process to be dead")
            self.num_killed += 1

    @property
    def fired(self) -> bool:
        return self.num_killed > 0


@dataclass
class Stop(Lasting):
    """SIGSTOP of these processes, and SIGCONT: they live, keep all they hold, and do nothing."""

    victims: Sequence[psutil.Process]
    num_stopped: int = field(default=0, init=False)
    """Those that were seen in state T."""

    def fire(self) -> None:
        stopped = self._signal(signal.SIGSTOP)
        wait_until(lambda: all(map(_is_stopped_or_dead, stopped)), what="the processes to stop")
        self.num_stopped += sum(is_alive(process.pid) for process in stopped)

    def heal(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def fired(self) -> bool:
        return self.num_stopped > 0

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        reached = []
        for process in self.victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
                reached.append(process)
        return reached


def _is_stopped_or_dead(process: psutil.Process) -> bool:
    return not is_alive(process.pid) or process.status() == psutil.STATUS_STOPPED


def rank() -> Kill:
    return Kill("rank", lambda stack: processes(stack, "training.cluster.worker"))


def agent() -> Kill:
    return Kill("agent", lambda stack: processes(stack, "training.cluster.agent"))


def service(name: str) -> Kill:
    """One of the stack's services; its supervisor restarts it."""

    def find(stack: Stack) -> list[psutil.Process]:
        pid = supervisor.remote(stack.home).getProcessInfo(name)["pid"]
        return [psutil.Process(pid)] if pid else []

    return Kill(name, find)


def all_kinds() -> list[Kill]:
    """One of each that a training run should survive by itself."""
    return [rank(), agent(), service("s3"), service("mlflow")]
