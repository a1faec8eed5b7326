"""One contestant after another through the same faults, on the same hosts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from benchmarks.recovery.faults import FAULTS
from benchmarks.recovery.systems import SYSTEMS, System
from benchmarks.recovery.timeline import Recovery, longest_pause, recovery, step_seconds
from tests.faults.hosts import Cluster, Host

T = TypeVar("T")
NUM_HOSTS = 3
LOOK_SECONDS = 1.0
"""To look takes some of the same processors' time."""
STEADY_STEPS = 30
STEADY_SECONDS = 2.0
START_SECONDS = 120.0
LIMIT_SECONDS = 60.0
"""After which it counts as never."""
RETURN_SECONDS = 20.0
"""For a host to come back by itself, before what runs there is started anew."""
REJOIN = "rejoin"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one fault. `maybe_seconds` is None if nobody went on in time."""

    system: str
    num_bytes: int
    fault: str
    step_seconds: float
    maybe_seconds: float | None
    maybe_lost_seconds: float | None = None
    num_redone: int = 0


class NeverError(Exception):
    """What was waited for did not happen in time."""


@contextmanager
def running(
    name: str, num_bytes: int, *, num_hosts: int = NUM_HOSTS, parent: Path
) -> Iterator[tuple[System, Sequence[Host]]]:
    """A contestant on a cluster of its own, in steady training."""
    with (
        Cluster(num_hosts, store=os.environ["AWS_ENDPOINT_URL"]) as cluster,
        TemporaryDirectory(prefix=f"{name}-", dir=parent) as folder,
        closing(SYSTEMS[name](cluster, Path(folder), num_bytes)) as system,
    ):
        for host in cluster.hosts:
            system.start(host)
        wait_for_steady(system, cluster.hosts, START_SECONDS)
        yield system, cluster.hosts


def measure(name: str, num_bytes: int, faults: Sequence[str], *, parent: Path) -> Iterator[Result]:
    """Each fault once, each in a run that goes well until then; the run is begun anew where it cannot go on."""
    left = list(faults)
    while left:
        with running(name, num_bytes, parent=parent) as (system, hosts):
            while left:
                fault = left.pop(0)
                about = partial(Result, system=name, num_bytes=num_bytes, step_seconds=_recent_step_seconds(system))
                host = hosts[1 + len(left) % (NUM_HOSTS - 1)]
                try:
                    found = _suffer(fault, system, host)
                except NeverError:
                    yield about(fault=fault, maybe_seconds=None)
                    break
                yield about(
                    fault=fault,
                    maybe_seconds=found.seconds,
                    maybe_lost_seconds=found.lost_seconds,
                    num_redone=found.num_redone,
                )
                if left:
                    pause = _pause_at_return(fault, system, hosts, host)
                    if fault == "node loss":
                        yield about(fault=REJOIN, maybe_seconds=pause)


def _recent_step_seconds(system: System) -> float:
    return step_seconds(system.steps()[-STEADY_STEPS:])


def _suffer(fault: str, system: System, host: Host) -> Recovery:
    """The fault, until some group goes on; then it is healed. Raises `NeverError`."""
    fault_time = time.time()
    healing = FAULTS[fault].make(system, host)
    healing.fire()
    try:
        found = wait_for(lambda: recovery(system.steps(), fault_time=fault_time), LIMIT_SECONDS)
        assert healing.fired
    finally:
        healing.heal()
    return found


def _pause_at_return(fault: str, system: System, hosts: Sequence[Host], host: Host) -> float:
    """Wait until the host trains with the others again, by itself if it can. Returns how long these paused for it."""
    back = time.time()
    try:
        if FAULTS[fault].needs_restart or system.maybe_rank_on(host) is None:
            system.start(host)
            wait_for_steady(system, hosts, START_SECONDS)
        else:
            wait_for_steady(system, hosts, RETURN_SECONDS)
    except NeverError:
        system.start(host)
        wait_for_steady(system, hosts, START_SECONDS)
    return longest_pause(system.steps(), since=back, until=time.time())


def wait_for_steady(system: System, hosts: Sequence[Host], seconds: float) -> None:
    """Until all hosts have trained together for some steps, and for some time."""

    def look() -> bool | None:
        steps = system.steps()
        if not steps or steps[-1].num_ranks != len(hosts):
            return None
        last = [step for step in steps[-10 * STEADY_STEPS :] if step.group == steps[-1].group]
        is_long = len(last) >= STEADY_STEPS and last[-1].time - last[0].time >= STEADY_SECONDS
        return True if is_long or len(last) == 10 * STEADY_STEPS else None

    wait_for(look, seconds)


def wait_for(look: Callable[[], T | None], seconds: float) -> T:
    deadline = time.monotonic() + seconds
    while (found := look()) is None:
        if time.monotonic() > deadline:
            raise NeverError
        time.sleep(LOOK_SECONDS)
    return found
