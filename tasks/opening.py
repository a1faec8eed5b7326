"""From a preset and a dataset to a run: which one it is, and its record, new, as it was left, or begun anew."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tasks.initial import initial_weights, require_fitting
from tasks.results import Dataset
from tasks.stack import open_stack
from training.checkpoints import continuation
from training.checkpoints.continuation import Sibling
from training.config import Preset
from training.environment import fingerprint
from training.errors import UserError
from training.recipe import Recipe, load_recipe
from training.runs.record import (
    InitialWeights,
    Record,
    RunRecord,
    run_key,
    start_fresh,
    trajectory_key,
    without_failure,
)
from training.s3.objectstore import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that a run is a function of."""

    preset: Preset
    recipe: Recipe
    dataset_digest: str
    initial: InitialWeights | None

    @cached_property
    def run_key(self) -> str:
        return run_key(**self._determining)

    @cached_property
    def trajectory(self) -> str:
        """See `training.runs.record.trajectory_key`."""
        return trajectory_key(**self._determining)

    @property
    def _determining(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "preset": self.preset,
            "dataset_digest": self.dataset_digest,
            "initial_weights": self.initial.weights_sha256 if self.initial else None,
        }


def identify(preset: Preset, dataset: Dataset) -> Identity:
    """The run of a preset on a dataset version.

    Raises `UserError` if the model that it starts with is gone, or does not fit.
    """
    settings, store = open_stack()
    recipe = load_recipe(preset)
    maybe_initial = initial_weights(settings, store, preset)
    if maybe_initial is not None:
        require_fitting(store, recipe, maybe_initial)
    return Identity(preset=preset, recipe=recipe, dataset_digest=dataset.digest, initial=maybe_initial)


def open_run(store: Store, identity: Identity, fresh: str | None) -> tuple[RunRecord, Record]:
    """The run's record, made if missing. A failure of before is struck: to start again is to try again.

    A new run begins where another one of its trajectory stands; not so with `fresh`, which begins at step 0.
    """
    run = RunRecord(store, identity.run_key)
    run.create_if_missing()

    def change(record: Record) -> Record:
        if fresh is not None and record.fresh_mark != fresh:
            return replace(start_fresh(record), fresh_mark=fresh)
        return without_failure(record)

    record = run.update(change)
    if continuation.is_new(record):
        record = _continued(run, record, identity)
    num_steps = identity.preset.train.steps
    continuation.note_sibling(store, identity.trajectory, run_key=run.run_key, num_steps=num_steps)
    return run, record


def require_begun(store: Store, identity: Identity) -> None:
    """Raises `UserError` if there is nothing that this run could go on with."""
    record = RunRecord(store, identity.run_key).find()
    if record is not None and record.attempt_starts:
        return
    siblings = _siblings(store, identity)
    if not any(sibling.step for sibling in siblings):
        hint = "".join(f"; {_obstacle(sibling)}" for sibling in siblings)
        raise UserError(
            f"--resume: run {identity.run_key[:12]} was never begun; leave the option out to begin it{hint}"
        )


def _continued(run: RunRecord, record: Record, identity: Identity) -> Record:
    for sibling in _siblings(run.store, identity):
        if not sibling.step:
            log.info("%s", _obstacle(sibling))
            continue
        record = continuation.take_over(run, sibling)
        if record.continued is not None:
            log.info("goes on from step %d of run %s", record.continued.step, record.continued.run_key[:12])
            break
    return record


def _siblings(store: Store, identity: Identity) -> list[Sibling]:
    """Only those of this machine's environment: others have other bits."""
    found = continuation.find_siblings(
        store,
        identity.trajectory,
        run_key=identity.run_key,
        recipe=identity.recipe,
        num_steps=identity.preset.train.steps,
    )
    here = fingerprint() if found else {}  # it imports torch
    return [sibling for sibling in found if sibling.record.environment == here]


def _obstacle(sibling: Sibling) -> str:
    other = f"run {sibling.run.run_key[:12]} differs in its number of steps alone, but"
    if sibling.has_other_rates:
        return (
            f"{other} its learning rates are others from step {sibling.num_common_steps + 1} on, since the recipe's"
            " schedule depends on train.steps: nothing can be shared (a level schedule shares all)"
        )
    return f"{other} has no checkpoint of its first {sibling.num_common_steps} steps, and this run ends there"
