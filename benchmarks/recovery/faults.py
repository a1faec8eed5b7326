"""The faults, each with what heals it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import psutil

from benchmarks.recovery.systems import System
from tests.faults.hosts import Host
from tests.faults.injectors import KillProcess, Lasting, Stop
from tests.faults.machine import PowerLoss
from tests.faults.network import Cut


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`make` gives it; it is not fired yet."""

    make: Callable[[System, Host], Lasting]
    needs_restart: bool
    """Whether an engine would have to place something on the host again."""


@dataclass
class _Once(KillProcess, Lasting):
    """There is nothing to heal."""

    def heal(self) -> None:
        pass


@dataclass
class KillAll(Lasting):
    """`kill -9` of all that runs on a host, which is well: its kernel ends their connections."""

    host: Host
    num_killed: int = field(default=0, init=False)

    def fire(self) -> None:
        self.num_killed = len(self.host.processes())
        self.host.kill_all()

    def heal(self) -> None:
        """There is nothing to heal."""

    @property
    def fired(self) -> bool:
        return self.num_killed > 0


def _kill_worker(system: System, host: Host) -> Lasting:
    return _Once(_rank_on(system, host))


def _rank_on(system: System, host: Host) -> psutil.Process:
    found = system.maybe_rank_on(host)
    assert found is not None, "all were in training"
    return found


def _lose_coordinator(system: System, host: Host) -> Lasting:
    found = system.coordinator()
    return _Once(found) if isinstance(found, psutil.Process) else PowerLoss(found)


FAULTS: Mapping[str, Fault] = MappingProxyType(
    {
        "worker kill": Fault(make=_kill_worker, needs_restart=False),
        "node loss": Fault(make=lambda system, host: KillAll(host), needs_restart=True),
        "power loss": Fault(make=lambda system, host: PowerLoss(host), needs_restart=True),
        "partition": Fault(make=lambda system, host: Cut(host), needs_restart=False),
        "hang": Fault(make=lambda system, host: Stop([_rank_on(system, host)]), needs_restart=False),
        "coordinator loss": Fault(make=_lose_coordinator, needs_restart=True),
    }
)
