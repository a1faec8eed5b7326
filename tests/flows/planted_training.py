"""The library with a bug, for real agents and ranks: a copy of the `training` package with one text replaced."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import training
from tests.simulation.planted import PLANTED

REAL = Path(training.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A text that is there exactly once, and what takes its place; and the fault that brings it to light."""

    name: str
    module: str
    old: str
    new: str
    fault: str

    @property
    def slug(self) -> str:
        """Its name as `pytest -k` takes one."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower())


def of_simulation(name: str, fault: str) -> Bug:
    """One of those that the simulation finds."""
    (bug,) = [bug for bug in PLANTED if bug.name == name]
    return Bug(name=name, module=bug.module, old=bug.old, new=bug.new, fault=fault)


BUGS = (
    of_simulation("retention keeps the oldest", "all-killed"),
    of_simulation("a checkpoint replaces all others", "checkpoint-damaged"),
    of_simulation("a result strikes the checkpoints", "worker-killed"),
    of_simulation("a store is used again", "worker-killed"),
    of_simulation("the first group does not wait", "worker-killed"),
    of_simulation("silence is not noticed", "node-frozen"),
    of_simulation("any change of the record stops the workers", "worker-killed"),
    of_simulation("S3 away stops the workers", "s3-away"),
    of_simulation("who goes is lost", "node-leaves"),
    of_simulation("preemption is not heard", "node-leaves"),
    of_simulation("who said why is not heard", "rank-stopped"),
    of_simulation("nobody is asked for a newcomer's sake", "node-joins"),
    of_simulation("agents leave when idle", "worker-killed"),
    Bug(
        name="a checkpoint is loaded unseen",
        module="checkpoints.checkpoint",
        old="store.get_proven(base + part.name, sha256=part.sha256)",
        new="store.get(base + part.name)",
        fault="checkpoint-damaged",
    ),
    Bug(
        name="reading goes on one step too far",
        module="loop",
        old="self.feed.microbatches(workers=self.reducer.owned, step=step)",
        new="self.feed.microbatches(workers=self.reducer.owned, step=step + (step > 0))",
        fault="all-killed",
    ),
    Bug(
        name="memory is forgotten",
        module="loop",
        old="found = self.handover.find(since=since)",
        new="found = None",
        fault="worker-killed",
    ),
    Bug(
        name="the newest checkpoint is passed over",
        module="checkpoints.checkpoint",
        old="reference = record.checkpoints[-1]",
        new="reference = record.checkpoints[0]",
        fault="all-killed",
    ),
    Bug(
        name="the optimizer begins anew",
        module="checkpoints.state",
        old="        load_entries(self.optimizer, parameters, tensors, may_keep=may_keep)\n",
        new="",
        fault="all-killed",
    ),
)


def changed_source(bug: Bug) -> str:
    """The module with this bug. Raises `ValueError` if it does not apply."""
    source = (REAL / f"{bug.module.replace('.', '/')}.py").read_text()
    if source.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: the text is {source.count(bug.old)} times in {bug.module}.py: {bug.old!r}")
    return source.replace(bug.old, bug.new)


def plant(bug: Bug, folder: Path) -> dict[str, str]:
    """Variables with which a process runs the library with this bug."""
    shutil.copytree(REAL, folder / "training", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "training" / f"{bug.module.replace('.', '/')}.py").write_text(changed_source(bug))
    return {"PYTHONPATH": str(folder)}
