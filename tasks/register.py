"""Stage 4: the model in the registry, without code that a loader could run, and with proof of where it came from."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from tasks import mlflow_client, registry, tracking
from tasks.lifecycle import champions, model_file, projection
from tasks.lifecycle.champion import Change
from tasks.lifecycle.model_file import KeptVersion, Program, Signature, Tensor
from tasks.lineage import page
from tasks.models import load_model
from tasks.policy import patiently, stage_options
from tasks.provenance import commit_of
from tasks.results import Dataset, Evaluation, Registration, TrainedModel
from tasks.stack import open_stack
from training.config import Preset
from training.data.manifest import load_manifest
from training.data.opening import open_reader
from training.data.withdrawn import quarantined_records
from training.documents import digest_of
from training.recipe import load_recipe
from training.runs.record import RunRecord
from training.s3.objectstore import Store

if TYPE_CHECKING:
    import numpy as np
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn

log = logging.getLogger(__name__)

CHALLENGER = "challenger"


def register_cache_key(context: Any, arguments: dict[str, Any]) -> str:
    settings, _ = open_stack()
    preset: Preset = arguments["preset"]
    model: TrainedModel = arguments["model"]
    return digest_of(
        {
            "stage": "register",
            "keeps": "model file",
            "registry": settings.mlflow_uri,
            "name": preset.name,
            "run": model.run_key,
            "weights": model.weights_sha256,
        }
    )


@task(name="register", cache_key_fn=register_cache_key, **stage_options(timeout_seconds=3600))
def register(preset: Preset, dataset: Dataset, model: TrainedModel, evaluation: Evaluation) -> Registration:
    """Make the registry's version of this run, once. Then it is the challenger; the very first is the champion too."""
    settings, store = open_stack()
    record = RunRecord(store, model.run_key).read()
    assert record.tracking_run_id is not None
    tracker = tracking.attach(settings.mlflow_uri, record.tracking_run_id)
    recipe = load_recipe(preset)
    tags = {
        mlflow_client.DATASET_TAG: dataset.digest,
        "unbroken.commit": commit_of(preset),
        "unbroken.preset": preset.name,
        **({mlflow_client.INEXACT_TAG: setting} if (setting := preset.train.maybe_inexact) else {}),
        **tracking.quarantine_tags(quarantined_records(store, dataset.name)),
        **{f"unbroken.test.{name}": f"{value.value:.6f}" for name, value in evaluation.metrics.items()},
    }
    version = registry.ensure_model_version(
        settings.mlflow_uri,
        preset.name,
        tracker,
        run_key=model.run_key,
        weights_sha256=model.weights_sha256,
        tags=tags,
        save=lambda path, mlflow_model: save_model(
            load_model(store, recipe, model.run_key), example_inputs(store, preset, dataset), path, mlflow_model
        ),
    )
    kept = model_file.keep(
        store,
        preset.name,
        str(version.version),
        run_key=model.run_key,
        weights_sha256=model.weights_sha256,
        dataset_digest=dataset.digest,
        fetch=lambda: registered_program(settings.mlflow_uri, version),
    )
    tag_with_file(settings.mlflow_uri, version, kept)
    aliases = set_aliases(settings.mlflow_uri, store, kept)
    page.show(settings, store, kept)
    log.info("model %s version %s: %s", preset.name, version.version, ", ".join(aliases))
    return Registration(
        name=preset.name,
        version=str(version.version),
        run_key=model.run_key,
        weights_sha256=model.weights_sha256,
        model_sha256=kept.model_sha256,
        model_bytes=kept.num_bytes,
        aliases=aliases,
        url=registry.version_url(settings.mlflow_uri, preset.name, str(version.version)),
    )


def registered_program(uri: str, version: ModelVersion) -> Program:
    """The bytes that MLflow has: another maker's may have come first."""
    data, found = registry.program_of(uri, version)
    inputs, outputs = (
        Tensor(dtype=spec.inputs[0].type.name, shape=tuple(spec.inputs[0].shape))
        for spec in (found.inputs, found.outputs)
    )
    return Program(data=data, signature=Signature(inputs=inputs, outputs=outputs))


def tag_with_file(uri: str, version: ModelVersion, kept: KeptVersion) -> None:
    tags = {registry.MODEL_TAG: kept.model_sha256, registry.MODEL_BYTES_TAG: str(kept.num_bytes)}
    for name, value in tags.items():
        if version.tags.get(name) != value:
            registry.tag_version(uri, kept.model, kept.version, name, value)


def set_aliases(uri: str, store: Store, kept: KeptVersion) -> tuple[str, ...]:
    """Once for each version: `challenger` is the newest; `champion` the model's first one, as one create-only write
    decides (docs/lifecycle.md)."""
    client, name, version = mlflow_client.connect(uri), kept.model, kept.version
    known = client.get_model_version(name, version)
    if registry.ALIASES_DUE_TAG not in known.tags:
        return registry.aliases_of(client, name, version)
    if registry.is_newest(client, name, known):
        client.set_registered_model_alias(name, CHALLENGER, version)
    first = Change(
        action="first",
        version=version,
        run_key=kept.run_key,
        model_sha256=kept.model_sha256,
        by="registration",
    )
    current = champions.begin(store, name, first).current
    if (current.version, current.run_key) == (version, kept.run_key):
        projection.show_first(uri, store, name, current)
    client.delete_model_version_tag(name, version, registry.ALIASES_DUE_TAG)
    return registry.aliases_of(client, name, version)


def registered(preset: Preset, dataset: Dataset, model: TrainedModel, evaluation: Evaluation) -> Registration:
    """`register`, done again if the version was deleted since, and with the aliases that it has now."""
    known = register(preset, dataset, model, evaluation)
    uri, weights = open_stack()[0].mlflow_uri, model.weights_sha256
    if not patiently(lambda: registry.has_version(uri, preset.name, run_key=model.run_key, weights_sha256=weights)):
        known = register.with_options(refresh_cache=True)(preset, dataset, model, evaluation)
    client = mlflow_client.connect(uri)
    return replace(known, aliases=patiently(lambda: registry.aliases_of(client, known.name, known.version)))


def example_inputs(store: Store, preset: Preset, dataset: Dataset) -> np.ndarray[Any, Any]:
    """The model's input for two held-out samples (with one, the exported batch would be fixed to it)."""
    import torch

    manifest = load_manifest(store, dataset.name, dataset.digest)
    recipe = load_recipe(preset)
    with closing(open_reader(store, preset, recipe, manifest, "test")) as reader:
        batch = reader.read([0, len(reader) - 1]).fields
    return recipe.inputs({name: torch.from_numpy(array) for name, array in batch.items()}).numpy()


def save_model(module: nn.Module, inputs: np.ndarray[Any, Any], path: Path, mlflow_model: Any) -> None:
    """An MLflow model folder holding a torch.export program of any batch size: it needs no recipe to be loaded.

    MLflow's own export keeps the example as a pickle inside; the program is written again without it, and without the
    recipe's source lines and where they lay: so its bytes are a function of model and release of torch alone.
    """
    import mlflow
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    example = torch.from_numpy(inputs)
    with torch.inference_mode():
        outputs = module(example).numpy()
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(inputs.dtype), (-1, *inputs.shape[1:]))]),
        Schema([TensorSpec(np.dtype(outputs.dtype), (-1, *outputs.shape[1:]))]),
    )
    mlflow.pytorch.save_model(
        module,
        str(path),
        serialization_format="pt2",
        signature=signature,
        input_example=inputs,
        mlflow_model=mlflow_model,
        pip_requirements=[f"mlflow=={mlflow.__version__}", f"torch=={torch.__version__.split('+')[0]}", "numpy"],
    )
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
    program._example_inputs = ((None,), {})
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    torch.export.save(program, path / "data" / "model.pt2")
