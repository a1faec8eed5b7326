"""A drill's report beside the model version that it speaks for, so that a gate can require it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.settings import Settings
from tasks import registry
from tasks.drill.rows import Report
from tasks.drill.subject import subject_of
from training.config import Preset
from training.errors import UserError
from training.recipe import load_recipe
from training.runs.proof import find_job, own_recipe
from training.s3.objectstore import Store


@dataclass(frozen=True, kw_only=True)
class Version:
    """Of a registered model."""

    name: str
    number: str


def require_subject(settings: Settings, store: Store, preset: Preset, text: str) -> Version:
    """The version that `text` (NAME/VERSION or NAME@ALIAS) means, before a drill begins that is to be attached to it.

    Raises `UserError` if there is none, or if it came from another recipe or configuration than the preset's.
    """
    name, number = registry.find_version(settings.mlflow_uri, text, what="--attach")
    key, _ = registry.origin_of(settings.mlflow_uri, name, number)
    job = find_job(store, key)
    if job is None:
        raise UserError(f"--attach {text}: run {key[:12]} is not on this store: nothing says what it was trained with")
    subject = subject_of(preset, load_recipe(preset))
    try:
        theirs = subject_of(job.preset, own_recipe(store, job))
    except UserError:  # its source is another one now
        theirs = ""
    if theirs != subject:
        raise UserError(
            f"--attach {text}: that version came from another recipe, source or configuration than {preset.name!r} has"
            " now: a drill of the one says nothing of the other"
        )
    return Version(name=name, number=number)


def attach_to(settings: Settings, version: Version, report: Report, paths: Sequence[Path]) -> None:
    """Tags on the version, and the files among the artifacts of its run. A later drill replaces an earlier one's.

    Raises `InfrastructureError` if MLflow is away.
    """
    tags = {
        registry.DRILL_TAG: "green" if report.is_green else "red",
        f"{registry.DRILL_TAG}.id": report.id,
        f"{registry.DRILL_TAG}.subject": report.subject,
        f"{registry.DRILL_TAG}.code": report.code,
        f"{registry.DRILL_TAG}.faults": ",".join(row.fault for row in report.rows),
        f"{registry.DRILL_TAG}.report_sha256": report.sha256,
    }
    registry.attach_files(settings.mlflow_uri, version.name, version.number, tags, paths, folder=f"drill/{report.id}")
