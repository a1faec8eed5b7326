"""The lineage on the version's page in MLflow: its description, and a file among the run's artifacts."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

from infra.settings import Settings
from tasks import registry
from tasks.lifecycle import model_file
from tasks.lifecycle.model_file import KeptVersion
from tasks.lifecycle.promotion import Outcome
from tasks.lineage.gather import lineage_of
from tasks.lineage.tree import markdown, tree_of
from training.errors import UnbrokenError
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

HEADING = "**Where this version came from** (`unbroken models why`)\n\n"
"""A description that begins otherwise is a person's, and stays."""


def show(settings: Settings, store: Store, kept: KeptVersion) -> bool:
    """Write it, anew if it is there; False if a person wrote the description, and the file alone was written.

    Raises `InfrastructureError` if a server is away.
    """
    lineage = lineage_of(settings, store, kept)
    if "mlflow" in lineage.links:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{kept.model}-{kept.version}.json"
            path.write_text(json.dumps(asdict(lineage), indent=1))
            registry.attach_files(settings.mlflow_uri, kept.model, kept.version, {}, [path], folder="lineage")
    return registry.describe_version(
        settings.mlflow_uri, kept.model, kept.version, HEADING + markdown(tree_of(lineage)), heading=HEADING
    )


def renew(settings: Settings, store: Store, outcome: Outcome) -> None:
    """After a change of champion, which stands whatever becomes of the page: what is wrong is only logged."""
    if not outcome.is_shown:  # MLflow was away just now
        return
    try:
        show(settings, store, model_file.find(store, outcome.model, outcome.entry.version))
    except UnbrokenError as error:
        log.warning("the page of model %s version %s is not renewed: %s", outcome.model, outcome.entry.version, error)
