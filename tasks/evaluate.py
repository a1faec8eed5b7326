"""Stage 3: judge the trained model on the held-out samples, with confidence intervals and figures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
from prefect import task

from tasks import tracking
from tasks.done import find_result, keep_result
from tasks.figures import confusion_figure, loss_figure
from tasks.models import load_model
from tasks.policy import stage_options
from tasks.results import Dataset, Estimate, Evaluation, TrainedModel
from tasks.stack import open_stack
from training.config import EvaluateConfig, Preset
from training.data.activity import distrust
from training.data.manifest import load_manifest
from training.data.opening import open_reader
from training.documents import digest_of
from training.errors import DamagedError, UserError
from training.recipe import Recipe, load_recipe
from training.runs.history import committed_steps
from training.runs.record import RunRecord
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

Scores = Mapping[str, "np.ndarray[Any, Any]"]
SCORING = 1
"""Raise it when this file makes something else of the same model and samples: what was kept is not found then."""


def evaluate_cache_key(context: Any, arguments: dict[str, Any]) -> str:
    preset: Preset = arguments["preset"]
    model: TrainedModel = arguments["model"]
    shown_in = RunRecord(open_stack()[1], model.run_key).read().tracking_run_id  # a fresh training has a run of its own
    return digest_of(
        {
            "stage": "evaluate",
            "scoring": SCORING,
            "model": asdict(model),
            "evaluate": asdict(preset.evaluate),
            "shown_in": shown_in,
        }
    )


@task(name="evaluate", cache_key_fn=evaluate_cache_key, **stage_options(timeout_seconds=6 * 3600))
def evaluate(preset: Preset, dataset: Dataset, model: TrainedModel) -> Evaluation:
    """Score every held-out sample, and log metrics and figures to the run's MLflow run; once, whoever asks."""
    settings, store = open_stack()
    digest = evaluate_cache_key(None, {"preset": preset, "model": model})
    key = f"runs/{model.run_key}/results/{digest}.json"
    known = find_result(store, key, Evaluation)
    if known is not None:
        _tell(known)
        return known
    recipe = load_recipe(preset)
    try:
        scores = score_samples(store, preset, recipe, dataset, model)
    except DamagedError:
        distrust(store, dataset.name)  # the next run looks at every shard again, and repairs from the source
        raise
    result = summarize(scores, recipe, preset.evaluate, model.run_key)
    run = RunRecord(store, model.run_key)
    record = run.read()
    assert record.tracking_run_id is not None
    figures = {"loss": loss_figure(committed_steps(run, record))}
    if result.confusion is not None:
        figures["confusion"] = confusion_figure(result.confusion)
    tracker = tracking.attach(settings.mlflow_uri, record.tracking_run_id)
    tracker.log_evaluation(_flat(result), figures, asdict(result))
    keep_result(store, key, result)
    _tell(result)
    return result


def _tell(result: Evaluation) -> None:
    for name, estimate in result.metrics.items():
        log.info("%s %.4f [%.4f, %.4f]", name, estimate.value, estimate.low, estimate.high)


def score_samples(store: Store, preset: Preset, recipe: Recipe, dataset: Dataset, model: TrainedModel) -> Scores:
    """The recipe's scores of the held-out samples, in the order of the manifest: one array [samples] per name."""
    import torch

    torch.set_num_threads(1)  # more threads give other bits
    manifest = load_manifest(store, dataset.name, dataset.digest)
    module = load_model(store, recipe, model.run_key)
    found: list[Scores] = []
    config = preset.evaluate
    with closing(open_reader(store, preset, recipe, manifest, "test")) as reader, torch.inference_mode():
        for rows in reader.read_all(batch_size=config.batch_size, num_samples=config.max_samples):
            tensors = {name: torch.from_numpy(array) for name, array in rows.fields.items()}
            found.append({name: score.numpy() for name, score in recipe.scores(module, tensors).items()})
    missing = set(recipe.metrics) - set(found[0])
    if missing:
        raise UserError(f"recipe {preset.recipe!r}: scores() lacks {', '.join(sorted(missing))}, named in `metrics`")
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def summarize(scores: Scores, recipe: Recipe, config: EvaluateConfig, run_key: str) -> Evaluation:
    """Means with percentile bootstrap intervals (Efron & Tibshirani 1993, ch. 13) over the samples."""
    num_samples = len(next(iter(scores.values())))
    return Evaluation(
        run_key=run_key,
        num_samples=num_samples,
        confidence=config.confidence,
        metrics={name: bootstrap(scores[name], config) for name in recipe.metrics},
        confusion=_confusion(scores),
    )


def bootstrap(values: np.ndarray[Any, Any], config: EvaluateConfig) -> Estimate:
    """The mean of `values` (shape [samples]) and its interval; the same resamples every time."""
    generator = np.random.Generator(np.random.PCG64(0))
    values = values.astype(np.float64)
    means = np.array(
        [values[generator.integers(0, len(values), size=len(values))].mean() for _ in range(config.bootstrap_samples)]
    )
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value=float(values.mean()), low=float(low), high=float(high))


def _confusion(scores: Scores) -> tuple[tuple[int, ...], ...] | None:
    if not {"label", "predicted"} <= scores.keys():
        return None
    label, predicted = scores["label"].astype(np.int64), scores["predicted"].astype(np.int64)
    size = int(max(label.max(), predicted.max())) + 1
    counts = np.bincount(label * size + predicted, minlength=size * size).reshape(size, size)
    return tuple(tuple(int(count) for count in row) for row in counts)


def _flat(result: Evaluation) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, estimate in result.metrics.items():
        flat |= {f"test.{name}": estimate.value, f"test.{name}.low": estimate.low, f"test.{name}.high": estimate.high}
    return flat
