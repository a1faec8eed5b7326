"""What is to be predicted: which version of which model, for which version of which dataset."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings import Settings
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.named import find_kept
from training.config import Preset
from training.data.versions import find_version
from training.errors import UserError
from training.recipe import Recipe, load_recipe, source_closure_digest
from training.runs.identity import find_identity
from training.runs.job import Job, read_jobs
from training.runs.record import run_key
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Names that stand for the same thing for ever."""

    model: str
    version: str
    dataset: str
    dataset_digest: str


def find_wanted(settings: Settings, store: Store, model: str, data: str) -> Wanted:
    """What these names mean now. Raises `UserError` if one of them means nothing."""
    kept = find_kept(settings, store, model)
    dataset, digest = find_version(store, data)
    return Wanted(model=kept.model, version=kept.version, dataset=dataset, dataset_digest=digest)


def preset_of(store: Store, kept: KeptVersion) -> Preset:
    """The preset of the run that a version came from, whose recipe says what the model takes of a sample.

    Raises `UserError` if the run was removed, or if the recipe is another one today: what it makes of a sample now is
    not what the model was trained on.
    """
    jobs = read_jobs(store, kept.run_key)
    if not jobs:
        raise UserError(
            f"model {kept.model!r} version {kept.version}: its run {kept.run_key[:12]} was removed, and with it what"
            " tells how samples become its input; train it again"
        )
    job = jobs[0]
    if not _is_trained_with(store, kept, load_recipe(job.preset), job):
        raise UserError(
            f"model {kept.model!r} version {kept.version}: recipe {job.preset.recipe!r} is another one today than that"
            f" which run {kept.run_key[:12]} was trained with: check out the commit that `unbroken models why`"
            " names, or train it again"
        )
    return job.preset


def _is_trained_with(store: Store, kept: KeptVersion, recipe: Recipe, job: Job) -> bool:
    """By its source; of an earlier release's run, which kept no word of that, by the whole run key."""
    identity = find_identity(store, kept.run_key)
    if identity is not None:
        return bool(identity.determining["recipe_source"] == source_closure_digest(recipe))
    initial = job.initial.weights_sha256 if job.initial is not None else None
    known = run_key(recipe=recipe, preset=job.preset, dataset_digest=job.dataset_digest, initial_weights=initial)
    return known == kept.run_key
