"""Faults as objects. Each says whether it fired: a test of a fault that never happened proves nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from infra.local import supervisor
from tests.conftest import Stack
from tests.flows.runs import processes


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
            victim.kill()
            psutil.wait_procs([victim], timeout=10)
            self.num_killed += 1

    @property
    def fired(self) -> bool:
        return self.num_killed > 0


def rank() -> Kill:
    return Kill("rank", lambda stack: processes(stack, "training.worker"))


def agent() -> Kill:
    return Kill("agent", lambda stack: processes(stack, "training.agent"))


def service(name: str) -> Kill:
    """One of the stack's services; its supervisor restarts it."""

    def find(stack: Stack) -> list[psutil.Process]:
        pid = supervisor.remote(stack.home).getProcessInfo(name)["pid"]
        return [psutil.Process(pid)] if pid else []

    return Kill(name, find)


def all_kinds() -> list[Kill]:
    """One of each that a training run should survive by itself."""
    return [rank(), agent(), service("s3"), service("mlflow")]
