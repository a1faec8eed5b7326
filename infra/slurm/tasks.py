"""What the queue holds of a run: its array's tasks, one per node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from infra.slurm.commands import Commands
from training.documents import digest_of
from training.errors import InfrastructureError
from training.s3.objectstore import StoreLocation

PREFIX = "unbroken-"
FORMAT = "%F|%K|%j|%T|%r|%N"
NUM_FIELDS = FORMAT.count("|") + 1
HELD = ("JobHeldUser", "JobHeldAdmin")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One node's job, as long as the queue knows it: it waits, runs, or is about to end."""

    job_id: str
    """Of the whole array."""
    node: str
    key: str
    state: str
    reason: str
    """Why it waits."""
    host: str

    @property
    def is_held(self) -> bool:
        return self.state == "PENDING" and self.reason in HELD

    def describe(self) -> str:
        """In a few words, as Slurm names it."""
        about = self.host or ("" if self.reason in ("", "None") else self.reason)
        return f"{self.state} ({about})" if about else self.state


def store_mark(location: StoreLocation) -> str:
    """Tells runs of one key on two stores apart, which are two runs."""
    return digest_of(asdict(location))[:12]


def job_name(mark: str, key: str) -> str:
    return f"{PREFIX}{mark}-{key}"


def parse_tasks(lines: str, *, mark: str) -> list[Task]:
    """Those of `squeue --format FORMAT` that are of runs on the store of this mark. Raises `InfrastructureError` for
    what is not in that format."""
    found = []
    beginning = job_name(mark, "")
    for line in lines.splitlines():
        fields = line.strip().split("|")
        if len(fields) != NUM_FIELDS:
            raise InfrastructureError(f"squeue printed {line[:200]!r}, which is no line of {FORMAT}: see `squeue`")
        job_id, node, name, state, reason, host = fields
        if name.startswith(beginning):
            key = name.removeprefix(beginning)
            found.append(Task(job_id=job_id, node=node, key=key, state=state, reason=reason, host=host))
    return found


def list_tasks(commands: Commands, mark: str, *, key: str | None = None) -> list[Task]:
    """Those of a run, or of all runs of this user. A task is listed until its last process is gone."""
    which = ("--name", job_name(mark, key)) if key is not None else ()
    return parse_tasks(commands.run("squeue", "--noheader", "--array", "--me", "--format", FORMAT, *which), mark=mark)


def ids_of(tasks: Sequence[Task]) -> set[str]:
    return {task.job_id for task in tasks}
