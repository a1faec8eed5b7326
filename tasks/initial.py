"""From the registered model that a preset names to the weights that a run begins with."""

from __future__ import annotations

from dataclasses import replace

from infra.settings import Settings
from tasks import registry
from training.checkpoints.trust import trusted_result
from training.config import Preset
from training.errors import UserError
from training.recipe import Recipe
from training.runs.record import InitialWeights, RunRecord, generation_prefix
from training.s3.objectstore import Store


def pinned(settings: Settings, preset: Preset) -> Preset:
    """The preset with its `warm_start` as NAME/VERSION: an alias may move while a pipeline runs.

    Raises `UserError` if there is no such model, alias or version.
    """
    text = preset.train.warm_start
    if text is None:
        return preset
    name, version = registry.find_version(settings.mlflow_uri, text)
    return replace(preset, train=replace(preset.train, warm_start=f"{name}/{version}"))


def initial_weights(settings: Settings, store: Store, preset: Preset) -> InitialWeights | None:
    """Raises `UserError` if the model's run is gone, or was trained anew and holds other weights now, and
    `UntrustedError`."""
    text = preset.train.warm_start
    if text is None:
        return None
    version = registry.find_version(settings.mlflow_uri, text)
    key, weights_sha256 = registry.origin_of(settings.mlflow_uri, *version)
    run = RunRecord(store, key)
    record = run.find()
    if record is None or record.result is None or record.result.weights_sha256 != weights_sha256:
        raise UserError(
            f"train.warm_start = {text!r}: its weights {weights_sha256[:12]} are no more the result of run {key[:12]}"
            " on this store: the run was removed, or trained anew"
        )
    return InitialWeights(
        run_key=key,
        generation=record.generation,
        checkpoint=trusted_result(run, record).checkpoint,
        weights_sha256=weights_sha256,
    )


def require_fitting(store: Store, recipe: Recipe, initial: InitialWeights, *, what: str = "train.warm_start") -> None:
    """Raises `UserError`, which says for what, naming a weight of the recipe's model that has another shape there:
    before anything starts."""
    from training.checkpoints.checkpoint import load_manifest
    from training.checkpoints.state import require_fit

    manifest = load_manifest(store, generation_prefix(initial.run_key, initial.generation), initial.checkpoint)
    weights = {
        name.removeprefix("model."): i.shape for name, i in manifest.tensors.items() if name.startswith("model.")
    }
    require_fit(recipe.model(), weights, what=what)
