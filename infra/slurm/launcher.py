"""The launcher on Slurm: submit held, claim by compare-and-set, release. Whatever dies in between, the next goes on.

A run has one array at most that is released, from however many hosts it was submitted (docs/slurm.md).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from infra.launcher import JobSpec, JobState, JobStatus, is_others
from infra.slurm.batch import sbatch_arguments, script
from infra.slurm.claims import Claim, change_claim, read_claim
from infra.slurm.commands import Commands, Refusal
from infra.slurm.offer import what_would_fit
from infra.slurm.site import Site
from infra.slurm.tasks import Task, ids_of, job_name, list_tasks, store_mark
from training.errors import FencedError, InfrastructureError, UserError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

GONE_SECONDS = 60.0
LOOK_SECONDS = 0.25


class SlurmLauncher:
    """Implements `infra.launcher.Launcher` with Slurm's commands."""

    def __init__(self, home: Path, store: Store, site: Site, *, max_age_seconds: float = 0.0) -> None:
        """`home` must be the same folder on all nodes: logs are written there. `find` and `jobs`, which are asked all
        the time, may answer by a queue that was seen so long ago."""
        self._home = home
        self._store = store
        self._site = site
        self._mark = store_mark(store.location)
        self._commands = Commands.at(site.commands)
        self._max_age_seconds = max_age_seconds
        self._seen: list[Task] = []
        self._seen_at = -math.inf

    def submit(self, spec: JobSpec) -> None:
        if spec.store != self._store.location.uri():
            raise UserError(f"the settings name the store {self._store.location.uri()}, and this job {spec.store}")
        claim = self._claimed(spec)
        while claim is None:
            claim = self._submit_and_claim(spec)
        tasks = self.tasks(spec.key)
        self._release(claim, tasks)
        self._end(ids_of(tasks) - {claim.job_id})

    def find(self, key: str) -> JobStatus | None:
        try:
            claim = read_claim(self._store, key)
            if not claim.job_id:
                return None
            tasks = _of_claim(self._recent_tasks(), claim)
            if not tasks:  # that it has ended is not said by what was seen before it began
                tasks = _of_claim(self.tasks(key), claim)
        except InfrastructureError as error:
            log.warning("%s", error)
            return JobStatus(state=JobState.UNKNOWN, nodes={})
        return JobStatus(
            state=JobState.RUNNING if tasks else JobState.ENDED,
            nodes={f"node{task.node}": task.describe() for task in tasks},
        )

    def jobs(self) -> Mapping[str, Sequence[str]]:
        keys = sorted({task.key for task in self._recent_tasks()})
        claims = {key: read_claim(self._store, key) for key in keys}
        return {key: claim.owners for key, claim in claims.items() if claim.job_id}

    def logs(self, key: str) -> Sequence[Path]:
        return sorted(self._log_folder(key).glob("*.log"))

    def reap(self, key: str) -> None:
        """Nothing: a node's processes end with its job, and `ENDED` says that none is left."""

    def cancel(self, key: str, *, by: set[str] | None = None) -> bool:
        def without_array(claim: Claim) -> Claim:
            return claim if is_others(claim.owners, by) else Claim(generation=claim.generation)

        is_kept = by is not None  # while the store is away, nobody knows whether there are others
        try:
            is_kept = bool(change_claim(self._store, key, without_array).job_id)
        finally:  # also while the store is away: who waits in the queue then finds an array that is not there
            if not is_kept:
                self._end_all(key)
        return not is_kept

    def tasks(self, key: str) -> list[Task]:
        """All that the queue has of a run, the claim's array or not."""
        return list_tasks(self._commands, self._mark, key=key)

    def _claimed(self, spec: JobSpec) -> Claim | None:
        """The claim, with the owner of this spec in it, if the array that it names is there."""
        tasks = self.tasks(spec.key)
        now = read_claim(self._store, spec.key)
        _require_not_newer(now, spec)
        if now.generation != spec.generation or now.job_id not in ids_of(tasks):
            return None

        def with_owner(claim: Claim) -> Claim:
            if claim.job_id != now.job_id or spec.owner is None or spec.owner in claim.owners:
                return claim
            return replace(claim, owners=(*claim.owners, spec.owner))

        claim = change_claim(self._store, spec.key, with_owner)
        return claim if claim.job_id == now.job_id else None

    def _submit_and_claim(self, spec: JobSpec) -> Claim | None:
        """None if somebody else was first, and has an array that counts."""
        before = read_claim(self._store, spec.key)
        _require_not_newer(before, spec)
        job_id = self._submit_held(spec)
        ours = Claim(
            job_id=job_id,
            generation=spec.generation,
            owners=(*_owners_kept(before, spec), *([spec.owner] if spec.owner else [])),
        )
        claim = change_claim(self._store, spec.key, lambda found: ours if found == before else found)
        if claim == ours:
            return claim
        self._end({job_id})
        return self._claimed(spec)

    def _submit_held(self, spec: JobSpec) -> str:
        folder = self._log_folder(spec.key)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = sbatch_arguments(spec, self._site, name=job_name(self._mark, spec.key), log_folder=folder)
        sbatch = partial(self._commands.run, "sbatch", *arguments, environment=spec.environment, given=script(spec))
        try:
            sbatch("--test-only")  # a held job is not refused before it is released
            said = sbatch("--hold")
        except Refusal as error:
            raise UserError(f"Slurm refused the job: {error}\n{what_would_fit(self._commands)}") from error
        return said.strip().partition(";")[0]

    def _release(self, claim: Claim, tasks: Sequence[Task]) -> None:
        if any(task.is_held for task in tasks if task.job_id == claim.job_id):
            self._commands.run("scontrol", "release", claim.job_id)

    def _end_all(self, key: str) -> None:
        """Until no process is left. Raises `InfrastructureError` if that takes too long."""
        deadline = time.monotonic() + GONE_SECONDS
        while tasks := self.tasks(key):
            self._end(ids_of(tasks))
            if time.monotonic() > deadline:
                states = ", ".join(f"node {task.node} {task.describe()}" for task in tasks)
                raise InfrastructureError(f"Slurm has not ended job {key[:12]} in {GONE_SECONDS:.0f} s: {states}")
            time.sleep(LOOK_SECONDS)

    def _end(self, job_ids: set[str]) -> None:
        """Its nodes see that it was cancelled, and make no last checkpoint: what is proven stays."""
        if job_ids:
            self._commands.run("scancel", "--quiet", *sorted(job_ids))  # one that has ended is no error

    def _recent_tasks(self) -> list[Task]:
        """All runs'."""
        now = time.monotonic()
        if now - self._seen_at >= self._max_age_seconds:
            self._seen, self._seen_at = list_tasks(self._commands, self._mark), now
        return self._seen

    def _log_folder(self, key: str) -> Path:
        return self._home / "logs" / "jobs" / key


def _of_claim(tasks: Sequence[Task], claim: Claim) -> list[Task]:
    return [task for task in tasks if task.job_id == claim.job_id]


def _require_not_newer(claim: Claim, spec: JobSpec) -> None:
    if claim.job_id and claim.generation > spec.generation:
        raise FencedError(f"run {spec.key[:12]} was begun anew by somebody else")


def _owners_kept(before: Claim, spec: JobSpec) -> tuple[str, ...]:
    """Those of an array of this generation that ended: they still want it."""
    return tuple(owner for owner in before.owners if owner != spec.owner and before.generation == spec.generation)
