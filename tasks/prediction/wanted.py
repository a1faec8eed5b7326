"""What is to be predicted: which version of which model, for which version of which dataset."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings import Settings
from tasks import registry
from tasks.lifecycle.model_file import KeptVersion
from tasks.serving import published
from training.config import Preset
from training.data.versions import find_version
from training.errors import UserError
from training.recipe import load_recipe
from training.runs.job import read_jobs
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
    kept = find_model(settings, store, model)
    dataset, digest = find_version(store, data)
    return Wanted(model=kept.model, version=kept.version, dataset=dataset, dataset_digest=digest)


def find_model(settings: Settings, store: Store, text: str) -> KeptVersion:
    """NAME or NAME@champion (by the store, whatever its alias shows), NAME/VERSION, or NAME@ALIAS.

    Raises `UserError` if there is none, or if its model file was never kept.
    """
    name, _, alias = text.partition("@")
    name, _, version = name.partition("/")
    if not name or (alias and version) or text[-1:] in "@/":
        raise UserError(f"{text!r} is no model: give NAME@champion, NAME/VERSION or NAME@ALIAS")
    if alias not in ("", "champion"):
        name, version = registry.find_version(settings.mlflow_uri, text, what="MODEL")
    if version:
        return published.find_version(store, name, version)
    return published.of_champion(store, name, published.find_champion(store, name))


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
    found = run_key(
        recipe=load_recipe(job.preset),
        preset=job.preset,
        dataset_digest=job.dataset_digest,
        initial_weights=job.initial.weights_sha256 if job.initial is not None else None,
    )
    if found != kept.run_key:
        raise UserError(
            f"model {kept.model!r} version {kept.version}: recipe {job.preset.recipe!r}, or this project's arithmetic,"
            f" is not what run {kept.run_key[:12]} was trained with: check out the commit that the version's tag"
            " unbroken.commit names, or train it again"
        )
    return job.preset
