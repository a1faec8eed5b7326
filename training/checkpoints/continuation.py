"""More steps for a run that is there: a run that differs from it in the number of steps alone begins where it stands.

What is taken over, its history and a proven checkpoint, is copied under a token of the new run's own. So nothing else
needs to know, and the other run may be removed. trajectories/TRAJECTORY/NUM_STEPS-RUN_KEY says which runs there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from training.checkpoints.checkpoint import folder, load_manifest
from training.checkpoints.trust import signed_checkpoint
from training.documents import sha256_hex
from training.errors import DamagedError, FencedError, MissingError
from training.recipe import Recipe, learning_rate_scale
from training.runs.events import chunk_key
from training.runs.history import committed_steps
from training.runs.identity import find_identity
from training.runs.record import CheckpointRef, Continued, Record, RunRecord, trajectory_of, with_continued
from training.s3.objectstore import Store

_SIBLING = re.compile(r"(\d{1,18})-(\w+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """A run of the same trajectory, and how far its steps are those of ours."""

    run: RunRecord
    record: Record
    num_common_steps: int
    """After so many steps one of them ends, or they have other learning rates."""
    has_other_rates: bool
    """The schedule depends on the number of steps."""

    @property
    def usable(self) -> list[CheckpointRef]:
        """Its checkpoints that ours would have had too, the newest first."""
        return [c for c in reversed(self.record.checkpoints) if c.step <= self.num_common_steps]

    @property
    def step(self) -> int:
        """How far it takes us."""
        return max((checkpoint.step for checkpoint in self.usable), default=0)


def note_sibling(store: Store, trajectory: str, *, run_key: str, num_steps: int) -> None:
    """Let runs of the same trajectory find this one."""
    store.put_immutable(f"trajectories/{trajectory}/{num_steps}-{run_key}", b"")


def find_siblings(store: Store, trajectory: str, *, run_key: str, recipe: Recipe, num_steps: int) -> list[Sibling]:
    """Other runs with this trajectory that have a checkpoint, those that help most first."""
    found = []
    for key, _ in store.list_keys(f"trajectories/{trajectory}/"):
        match = _SIBLING.fullmatch(key.rpartition("/")[2])
        if match is None:  # nobody's of ours
            continue
        other, other_key = match.groups()
        run = RunRecord(store, other_key)
        if other_key == run_key or not _is_of(store, other_key, trajectory, int(other)):
            continue
        record = run.find()
        if record is not None and record.checkpoints:
            num_common = _num_common_steps(recipe, num_steps, int(other))
            has_other_rates = num_common < min(num_steps, int(other))
            found.append(Sibling(run=run, record=record, num_common_steps=num_common, has_other_rates=has_other_rates))
    return sorted(found, key=lambda sibling: sibling.step, reverse=True)


def _is_of(store: Store, run_key: str, trajectory: str, num_steps: int) -> bool:
    """By what its key is of: the name in the trajectory's folder is anybody's who may write there."""
    try:
        identity = find_identity(store, run_key)
    except DamagedError:
        return False
    if identity is None:  # an earlier release's run, which kept no word of that
        return False
    document = identity.determining
    return document["preset"]["train"].get("steps") == num_steps and trajectory_of(document) == trajectory


def _num_common_steps(recipe: Recipe, num_steps: int, other: int) -> int:
    """How many first steps of two runs with so many steps have the same learning rates. A pure function."""
    shorter = min(num_steps, other)

    def differ(step: int) -> bool:
        return learning_rate_scale(recipe, step, num_steps) != learning_rate_scale(recipe, step, other)

    return next((step for step in range(shorter) if differ(step)), shorter)


def is_new(record: Record) -> bool:
    """Whether nobody has begun this run, nor asked for it to begin anew."""
    return not (record.members or record.attempt_starts or record.checkpoints or record.fresh_mark)


def take_over(run: RunRecord, sibling: Sibling) -> Record:
    """Begin `run` with the sibling's newest checkpoint that is whole. Returns its record, which holds no more than
    before if there is none, or if somebody else began the run meanwhile."""
    for checkpoint in sibling.usable:
        try:
            return _take_over(run, sibling, checkpoint)
        except (DamagedError, MissingError):  # the run that has it will find out by itself
            continue
        except FencedError:
            break
    return run.read()


def _take_over(run: RunRecord, sibling: Sibling, checkpoint: CheckpointRef) -> Record:
    claimed = run.update(lambda record: replace(record, token=record.token + 1) if is_new(record) else record)
    if not is_new(claimed):
        return claimed
    mine = signed_checkpoint(run.prefix(claimed), replace(checkpoint, token=claimed.token))
    _copy_history(run, claimed, sibling, until=checkpoint.step)
    _copy_checkpoint(run, claimed, sibling, checkpoint, mine)
    continued = Continued(run_key=sibling.run.run_key, generation=sibling.record.generation, step=checkpoint.step)
    return run.update(lambda record: with_continued(record, continued, mine, sibling.record.environment))


def _copy_history(run: RunRecord, claimed: Record, sibling: Sibling, *, until: int) -> None:
    events = [event for event in committed_steps(sibling.run, sibling.record) if event.step <= until]
    if [event.step for event in events] != list(range(1, until + 1)):
        raise DamagedError(f"run {sibling.run.run_key[:12]} has lost events of its first {until} steps")
    data = b"".join(event.to_line() for event in events)
    run.store.put_proven(chunk_key(run.prefix(claimed), claimed.token, 0), data, sha256=sha256_hex(data))


def _copy_checkpoint(
    run: RunRecord, claimed: Record, sibling: Sibling, theirs: CheckpointRef, mine: CheckpointRef
) -> None:
    """Every object under its own name: so the manifest, and its digest, stay the same."""
    source = sibling.run.prefix(sibling.record)
    manifest = load_manifest(sibling.run.store, source, theirs)
    digests = {part.name: part.sha256 for part in manifest.parts} | {"manifest.json": theirs.sha256}
    for name, sha256 in digests.items():
        data = sibling.run.store.get_proven(folder(source, theirs.step, theirs.token) + name, sha256=sha256)
        run.store.put_proven(folder(run.prefix(claimed), mine.step, mine.token) + name, data, sha256=sha256)
