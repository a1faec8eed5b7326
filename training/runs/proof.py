"""A run's job and recipe, once its key says that they are its own: whoever may write the store may put others there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.documents import digest_of, sha256_hex
from training.errors import DamagedError, UserError
from training.recipe import Recipe, load_recipe
from training.runs.identity import Identity, find_identity
from training.runs.job import Job, read_jobs
from training.runs.record import run_key
from training.s3.objectstore import Store
from training.sources import closure_without_import

OUR_RECIPES = "training.recipes."


def find_job(store: Store, key: str) -> Job | None:
    """The first of a run's jobs, which say the same of all that determines the result; None if it has none.

    Raises `DamagedError` if there are some, and the run key is of none of them.
    """
    jobs, maybe_identity = read_jobs(store, key), find_identity(store, key)
    if not jobs or maybe_identity is None:  # an earlier release's run, which kept no word of what its key is of
        return jobs[0] if jobs else None
    wrong = [mismatch(maybe_identity, job) for job in jobs]
    if all(wrong):
        where = store.location.uri(f"runs/{key}/jobs/")
        raise DamagedError(f"{where}: the run key is of none of its jobs: {wrong[0]}")
    return jobs[wrong.index("")]


def mismatch(identity: Identity, job: Job) -> str:
    """What a job says that its run key is not of; empty if there is nothing. Settings that are newer than the run are
    not compared."""
    found = {
        "recipe": job.preset.recipe,
        "dataset": job.dataset_digest,
        "initial_weights": job.initial.weights_sha256 if job.initial is not None else None,
        "preset": {name: value for name, value in job.preset.determining().items() if name != "hyperparameters"},
    }
    due, told = identity.determining["preset"].get("parallel", {}), job.preset.parallel.determining()
    if due != told:  # named only if it changes the result
        return f"preset.parallel = {told!r}, and the run key is of {due!r}"
    return _difference(identity.determining, found, "")


def _difference(due: Mapping[str, Any], found: Mapping[str, Any], where: str) -> str:
    for name, value in found.items():
        if name not in due:
            continue
        if isinstance(value, Mapping) and isinstance(due[name], Mapping):
            if below := _difference(due[name], value, f"{where}{name}."):
                return below
        elif digest_of(due[name]) != digest_of(value):
            return f"{where}{name} = {value!r}, and the run key is of {due[name]!r}"
    return ""


def own_recipe(store: Store, job: Job, *, may_have_changed: bool = False) -> Recipe:
    """A run's recipe. Nothing is imported that a document on the store could have chosen: its files here are those that
    the run key is of; or, if they may have changed since, it is installed, or in the folder one is in or below.

    Raises `UserError`.
    """
    preset, identity = job.preset, find_identity(store, job.key)
    if identity is None:
        return _recipe_of_an_earlier_release(job)
    if not _is_source_of(identity, job):
        is_near = not preset.folder or Path.cwd() in (Path(preset.folder), *Path(preset.folder).parents)
        if not (may_have_changed and is_near and identity.determining.get("recipe") == preset.recipe):
            raise _another_one(job)
        return load_recipe(preset)
    recipe = load_recipe(preset)
    if digest_of(asdict(recipe)) != digest_of(identity.determining["preset"].get("hyperparameters")):
        raise UserError(f"a job of run {job.key[:12]} has other hyperparameters than its run key is of")
    return recipe


def _recipe_of_an_earlier_release(job: Job) -> Recipe:
    """Which kept no word of its source, but for the run key."""
    if not job.preset.recipe.startswith(OUR_RECIPES):
        raise UserError(
            f"run {job.key[:12]} was begun by an earlier release, which kept no word of its recipe's source:"
            f" {job.preset.recipe!r} is not imported for it; train it again"
        )
    recipe, initial = load_recipe(job.preset), job.initial.weights_sha256 if job.initial is not None else None
    known = run_key(recipe=recipe, preset=job.preset, dataset_digest=job.dataset_digest, initial_weights=initial)
    if known != job.key:
        raise _another_one(job)
    return recipe


def _another_one(job: Job) -> UserError:
    where = f" beside {job.preset.folder}" if job.preset.folder else ""
    return UserError(
        f"recipe {job.preset.recipe!r}{where} is another one today than that which run {job.key[:12]} was trained with,"
        " and is not imported: check out the commit that `unbroken models why` names, or train it again"
    )


def _is_source_of(identity: Identity, job: Job) -> bool:
    files = closure_without_import(job.preset.recipe, job.preset.folder)
    digests = {name: sha256_hex(path.read_bytes()) for name, path in files.items()}
    return digest_of(digests) == identity.determining.get("recipe_source")
