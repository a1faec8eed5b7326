"""The classes of failure: for each, how often it is tried again, and what helps. docs/protocols.md has them as a table.

Imports no torch.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from training.runs.record import Record

CRASH_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT})
"""By which a process dies of what it did itself."""


@dataclass(frozen=True, kw_only=True)
class FailureClass:
    """What is done about failures of one class."""

    name: str
    kind: str
    """The error that a run ends with which was given up for it."""
    max_in_vain: int | None = None
    """So many groups that ended so, without a checkpoint between them, and the run stops; None: `launch.max_restarts`
    groups in a row that came no further."""
    advice: str = ""


INFRASTRUCTURE = FailureClass(name="infrastructure", kind="InfrastructureError")
PREEMPTION = FailureClass(name="preemption", kind="InfrastructureError")
DETERMINISTIC = FailureClass(name="deterministic", kind="DeterministicError")
CONFIGURATION = FailureClass(name="configuration", kind="UserError")
OUT_OF_MEMORY = FailureClass(
    name="out of memory",
    kind="OutOfMemoryError",
    max_in_vain=3,
    advice="a smaller train.batch_size or more train.virtual_workers (each makes the microbatches smaller, and another"
    " run), a smaller launch.processes_per_node, launch.data_workers or launch.cache_memory_bytes, or more memory",
)

CRASHED = "Crashed"
NOT_FOUND = (
    ". Replays before the last time died of no record, or not each time, or had too little time: half of"
    " launch.collective_timeout_seconds, of which a slow machine needs more"
)
"""Of a worker that died of itself, and nobody saw why."""
CLASSES: Mapping[str, FailureClass] = {
    "InfrastructureError": INFRASTRUCTURE,
    "FencedError": INFRASTRUCTURE,
    "Killed": INFRASTRUCTURE,
    "Hung": INFRASTRUCTURE,
    "NodeLost": INFRASTRUCTURE,
    "PeerLost": INFRASTRUCTURE,
    "Preempted": PREEMPTION,
    "Exception": DETERMINISTIC,
    CRASHED: DETERMINISTIC,
    "DeterministicError": DETERMINISTIC,
    "DamagedError": DETERMINISTIC,
    "UntrustedError": CONFIGURATION,
    "UserError": CONFIGURATION,
    "OutOfMemoryError": OUT_OF_MEMORY,
}
"""By the `class_name` of a departure."""
FOR_GOOD = ("UserError", "DeterministicError", "DamagedError", "UntrustedError")
"""Never tried again: their cause was seen at work twice, or does not change."""
MAX_ALIKE: Mapping[str, int] = {"Exception": 2, CRASHED: 3}
"""So many times the same at the same step, and the run stops. Between a worker's second and third death the record
that kills it is looked for (training.diagnosis.crashes)."""


class ReaderDiedError(Exception):
    """A process that reads for a worker ended, as its exit code says."""

    def __init__(self, code: int) -> None:
        self.class_name, message = of_exit_code(code, is_out_of_memory=False)
        super().__init__(f"a process that reads for a {message}")


def class_of(class_name: str) -> FailureClass:
    return CLASSES.get(class_name, INFRASTRUCTURE)


def num_failures(record: Record) -> int:
    """Groups that ended by a failure, of however many of their nodes. A preemption is none."""
    return len({gone.token for gone in record.departures if class_of(gone.class_name) is not PREEMPTION})


def of_exit_code(code: int, *, is_out_of_memory: bool) -> tuple[str, str]:
    """(class name, message) of a worker that ended without a word."""
    if code >= 0:
        return "Killed", f"worker exited with {code}"
    if code == -signal.SIGKILL and is_out_of_memory:
        return "OutOfMemoryError", "worker killed by the kernel, for lack of memory"
    if -code in CRASH_SIGNALS:
        return CRASHED, f"worker killed by {signal.Signals(-code).name}"
    return "Killed", f"worker killed by signal {-code}"


def crash_to_explain(record: Record) -> int | None:
    """The step after which workers died of themselves, and then again alike without having come further."""
    crashes = [d for d in record.departures if d.class_name == CRASHED and d.token > record.forgiven_token]
    if not crashes:
        return None
    last = crashes[-1]
    is_again = any(d.token < last.token and d.cause == last.cause and d.step >= last.step for d in crashes)
    return last.step if is_again else None


def oom_kills(own_cgroup: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed for lack of memory: in this process's control group, or else here."""
    candidates = [Path("/proc/vmstat")]
    for line in own_cgroup.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = root / controllers / path.lstrip("/")
            candidates[:0] = [folder / "memory.events", folder / "memory.oom_control"]
    for file in candidates:
        for found in file.read_text().splitlines() if file.is_file() else ():
            name, _, value = found.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0
