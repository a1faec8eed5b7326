"""The faults, each with the proof that it fired: what was seen to suffer, not that `fire` was called."""

from __future__ import annotations

import contextlib
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import psutil

from tasks.drill.gate import Gate
from tasks.drill.scene import Scene
from tasks.drill.watch import Watch
from training.checkpoints.checkpoint import folder, load_manifest
from training.runs.record import CheckpointRef

DEAD_SECONDS = 10.0
AWAY_SECONDS = 9.0
"""Longer than the agents' own store clients try again before they call it away."""


class Fault(ABC):
    """One thing that happens to a run, once."""

    name: ClassVar[str]
    title: ClassVar[str]
    leaves_memory: ClassVar[bool] = True
    """Some process that holds the state lives: so no step is redone, and the next group goes on from memory."""
    max_redone: ClassVar[int] = 0
    """Steps that may be done again all the same."""
    num_returns: ClassVar[int] = 0
    """How often a node comes back as the same incarnation."""
    ends_group: ClassVar[bool] = True
    otherwise: ClassVar[str] = "nothing was seen to suffer"
    """What it means that there is no evidence."""
    departure: ClassVar[str] = ""
    """The class under which the run must have noted it."""

    def __init__(self) -> None:
        self.evidence = ""

    @abstractmethod
    def fire(self, scene: Scene, watch: Watch) -> None:
        """Raises `LookupError` if what it strikes is not there."""

    def look(self, scene: Scene, watch: Watch, *, struck: int) -> None:  # noqa: B027  # most have nothing to do
        """Called again and again from then on; `struck` is the token of the group that was there. Heals it in time."""

    def heal(self) -> None:  # noqa: B027  # most need none
        """For the last time: the run is over, or given up."""

    def complaints(self, watch: Watch, newest: CheckpointRef) -> list[str]:
        """What the run did not do that it must after this fault; `newest` was its newest checkpoint then."""
        return []


def last_node(watch: Watch) -> int:
    """Neither the first node, which has rank 0, nor any but one that trains."""
    return max(member.node for member in watch.record.members)


def first_node(watch: Watch) -> int:
    return watch.record.members[0].node


class WorkerKilled(Fault):
    name, title = "worker-killed", "kill -9 of a rank"

    def fire(self, scene: Scene, watch: Watch) -> None:
        victim = scene.rank(last_node(watch))
        self.evidence = kill([victim], "rank")


class RankStopped(Fault):
    name, title = "rank-stopped", "SIGSTOP of a rank: it hangs"
    departure = "Hung"

    def __init__(self) -> None:
        super().__init__()
        self._victims: list[psutil.Process] = []

    def fire(self, scene: Scene, watch: Watch) -> None:
        self._victims = [scene.rank(last_node(watch))]
        self.evidence = stop(self._victims)

    def heal(self) -> None:
        wake(self._victims)


class AgentKilled(Fault):
    name, title = "agent-killed", "kill -9 of a node's agent, and with it of its ranks"
    departure = "NodeLost"

    def fire(self, scene: Scene, watch: Watch) -> None:
        self.evidence = kill([scene.agent(last_node(watch))], "agent")


class CoordinatorKilled(Fault):
    name, title = "coordinator-killed", "kill -9 of the first node's agent: rank 0, and the group's store"
    departure = "NodeLost"

    def fire(self, scene: Scene, watch: Watch) -> None:
        self.evidence = kill([scene.agent(first_node(watch))], "agent")


class NodeFrozen(Fault):
    name, title = (
        "node-frozen",
        "SIGSTOP of the first node until the others have gone on: it wakes up fenced off",
    )
    departure = "NodeLost"
    num_returns = 1
    max_redone = 1  # which it may just have finished, and the others not

    def __init__(self) -> None:
        super().__init__()
        self._victims: list[psutil.Process] = []

    def fire(self, scene: Scene, watch: Watch) -> None:
        self._victims = scene.processes(node=first_node(watch))
        self.evidence = stop(self._victims)

    def look(self, scene: Scene, watch: Watch, *, struck: int) -> None:
        if watch.has_stepped(after_token=struck):
            self.heal()

    def heal(self) -> None:
        wake(self._victims)
        self._victims = []


class NodeLeaves(Fault):
    name, title = "node-leaves", "SIGTERM to a node's agent: preemption"
    departure = "Preempted"

    def __init__(self) -> None:
        super().__init__()
        self._maybe_victim: psutil.Process | None = None

    def fire(self, scene: Scene, watch: Watch) -> None:
        self._maybe_victim = scene.agent(last_node(watch))
        self._maybe_victim.terminate()

    def look(self, scene: Scene, watch: Watch, *, struck: int) -> None:
        victim = self._maybe_victim
        if victim is not None and not is_alive(victim):
            self._maybe_victim = None
            self.evidence = f"agent {victim.pid} ended after SIGTERM"


class NodeJoins(Fault):
    name, title = "node-joins", "a node that was lost comes back while the others train"
    otherwise = "the node was not back before the run ended: give it more --steps"
    departure = "NodeLost"

    def __init__(self) -> None:
        super().__init__()
        self._killed = ""

    def fire(self, scene: Scene, watch: Watch) -> None:
        self._killed = kill([scene.agent(last_node(watch))], "agent")

    def look(self, scene: Scene, watch: Watch, *, struck: int) -> None:
        """The smaller group has trained, and after it one of all nodes."""
        sizes = watch.world_sizes(after_token=struck)
        if not self.evidence and sizes and min(sizes) < max(sizes) == sizes[-1]:
            self.evidence = f"{self._killed}; then {' and '.join(map(str, sizes))} ranks trained"


class AllKilled(Fault):
    name, title = "all-killed", "kill -9 of everything at once: power loss"
    leaves_memory = False

    def fire(self, scene: Scene, watch: Watch) -> None:
        self.evidence = kill(scene.processes(), "process")

    def complaints(self, watch: Watch, newest: CheckpointRef) -> list[str]:
        begun = _begun(watch, after_token=newest.token)
        if begun >= newest.step:
            return []
        return [f"it went on from step {begun}, although checkpoint {newest.step} was proven"]


class CheckpointDamaged(Fault):
    name, title = "checkpoint-damaged", "one bit of the newest checkpoint flipped, then kill -9 of everything"
    leaves_memory = False

    def __init__(self) -> None:
        super().__init__()
        self._maybe_damaged: CheckpointRef | None = None

    def fire(self, scene: Scene, watch: Watch) -> None:
        victims = scene.processes()
        stop(victims)  # or a newer checkpoint would be named meanwhile
        record = watch.trial.run.read()
        self._maybe_damaged = record.checkpoints[-1]
        what = flip_bit(watch, self._maybe_damaged)
        self.evidence = f"{what}; {kill(victims, 'process')}"

    def complaints(self, watch: Watch, newest: CheckpointRef) -> list[str]:
        if any(found.checkpoint == self._maybe_damaged for found in watch.record.quarantined):
            return []
        return ["the damaged checkpoint was not quarantined"]


class StoreAway(Fault):
    name, title = "s3-away", f"S3 refuses and resets all connections for {AWAY_SECONDS:.0f} s"
    ends_group = False

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate
        self._until = 0.0

    def fire(self, scene: Scene, watch: Watch) -> None:
        self._gate.shut()
        self._until = time.monotonic() + AWAY_SECONDS

    def look(self, scene: Scene, watch: Watch, *, struck: int) -> None:
        if self._gate.num_refused:
            self.evidence = f"{self._gate.num_refused} connections refused"
        if time.monotonic() > self._until:
            self._gate.open()

    def heal(self) -> None:
        self._gate.open()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(victims: list[psutil.Process], what: str) -> str:
    """`kill -9` of all, then wait. Returns who was seen dead."""
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait(lambda: not any(map(is_alive, victims)))
    dead = [process.pid for process in victims if not is_alive(process)]
    return f"{_counted(dead, what)} dead" if dead else ""


def stop(victims: Iterable[psutil.Process]) -> str:
    """SIGSTOP. Returns who was seen in state T."""
    stopped = _signalled(victims, signal.SIGSTOP)
    _wait(lambda: all(_is_stopped(process) or not is_alive(process) for process in stopped))
    seen = [process.pid for process in stopped if _is_stopped(process)]
    return f"{_counted(seen, 'process')} in state T" if seen else ""


def wake(victims: Iterable[psutil.Process]) -> None:
    _signalled(victims, signal.SIGCONT)


def flip_bit(watch: Watch, checkpoint: CheckpointRef) -> str:
    """In the midst of the first part, where it makes a number many times larger or smaller: a last bit may be rounded
    away again. Returns what was read back."""
    store, prefix = watch.trial.run.store, watch.trial.run.prefix(watch.record)
    part = load_manifest(store, prefix, checkpoint).parts[0]
    key = folder(prefix, checkpoint.step, checkpoint.token) + part.name
    data = bytearray(store.get(key))
    data[len(data) // 2 | 3] ^= 0x40  # of the exponent, if these are float32
    store.put(key, data)
    return f"a bit of checkpoint {checkpoint.step} is another" if store.get(key) == data else ""


def _begun(watch: Watch, *, after_token: int) -> int:
    """The step that the first later group began from; -1 if there was none."""
    record = watch.record
    return next((step for step in record.resume_steps[after_token:] if step is not None), -1)


def _signalled(victims: Iterable[psutil.Process], number: signal.Signals) -> list[psutil.Process]:
    reached = []
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            reached.append(process)
    return reached


def _is_stopped(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_STOPPED)
    return False


def _counted(pids: list[int], what: str) -> str:
    if len(pids) > 3:
        return f"{len(pids)} {'processes' if what == 'process' else what + 's'}"
    return f"{what} {', '.join(map(str, pids))}"


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEAD_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


FAULTS: tuple[type[Fault], ...] = (
    WorkerKilled,
    RankStopped,
    AgentKilled,
    CoordinatorKilled,
    NodeFrozen,
    NodeLeaves,
    NodeJoins,
    AllKilled,
    CheckpointDamaged,
    StoreAway,
)
NAMES = tuple(fault.name for fault in FAULTS)
