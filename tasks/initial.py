"""From the registered model that a preset names to the weights that a run begins with."""

from __future__ import annotations

from dataclasses import replace

from infra.settings import Settings
from tasks import tracking
from training.config import Preset
from training.errors import UserError
from training.objectstore import Store
from training.record import InitialWeights, RunRecord


def pinned(settings: Settings, preset: Preset) -> Preset:
    """The preset with its `warm_start` as NAME/VERSION: an alias may move while a pipeline runs.

    Raises `UserError` if there is no such model, alias or version.
    """
    text = preset.train.warm_start
    if text is None:
        return preset
    name, version = tracking.find_version(settings.mlflow_uri, text)
    return replace(preset, train=replace(preset.train, warm_start=f"{name}/{version}"))


def initial_weights(settings: Settings, store: Store, preset: Preset) -> InitialWeights | None:
    """Raises `UserError` if the model's run, or its result, is gone."""
    text = preset.train.warm_start
    if text is None:
        return None
    key = tracking.run_key_of(settings.mlflow_uri, *tracking.find_version(settings.mlflow_uri, text))
    record = RunRecord(store, key).find()
    if record is None or record.result is None:
        raise UserError(f"train.warm_start = {text!r}: the run {key[:12]} that gave this model is not on this store")
    result = record.result
    return InitialWeights(
        run_key=key, generation=record.generation, checkpoint=result.checkpoint, weights_sha256=result.weights_sha256
    )
