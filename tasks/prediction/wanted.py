"""What is to be predicted: which version of which model, for which version of which dataset."""

from __future__ import annotations

from dataclasses import dataclass

from infra.settings import Settings
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.named import find_kept
from training.config import Preset
from training.data.versions import find_version
from training.errors import UserError
from training.runs.proof import find_job, own_recipe
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
    job = find_job(store, kept.run_key)
    if job is None:
        raise UserError(
            f"model {kept.model!r} version {kept.version}: its run {kept.run_key[:12]} was removed, and with it what"
            " tells how samples become its input; train it again"
        )
    try:
        own_recipe(store, job)
    except UserError as error:
        raise UserError(f"model {kept.model!r} version {kept.version}: {error}") from error
    return job.preset
