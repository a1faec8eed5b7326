"""Stage 3: judge the trained model on the held-out samples, with confidence intervals and figures."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from prefect import task

from tasks import tracking
from tasks.done import find_result, keep_result
from tasks.evaluation.report import summarize
from tasks.evaluation.samples import SCORING, find_or_score, to_parquet
from tasks.evaluation.scoring import score_samples
from tasks.figures import confusion_figure, loss_figure, reliability_figure
from tasks.policy import stage_options
from tasks.results import Dataset, Evaluation, TrainedModel
from tasks.stack import open_stack
from training.config import Preset
from training.data.activity import distrust
from training.documents import digest_of
from training.errors import DamagedError
from training.runs.history import committed_steps
from training.runs.record import RunRecord

log = logging.getLogger(__name__)


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
    try:
        sha256, samples = find_or_score(
            store,
            run_key=model.run_key,
            weights_sha256=model.weights_sha256,
            dataset_digest=dataset.digest,
            config=preset.evaluate,
            score=lambda: score_samples(store, preset, dataset.digest, model.run_key),
        )
    except DamagedError:
        distrust(store, dataset.name)  # the next run looks at every shard again, and repairs from the source
        raise
    result = summarize(samples, preset.evaluate, model.run_key, sha256)
    run = RunRecord(store, model.run_key)
    record = run.read()
    assert record.tracking_run_id is not None
    figures = {"loss": loss_figure(committed_steps(run, record))}
    if result.confusion is not None:
        figures["confusion"] = confusion_figure(result.confusion)
    if result.calibration is not None:
        figures["reliability"] = reliability_figure(result.calibration)
    tracker = tracking.attach(settings.mlflow_uri, record.tracking_run_id)
    tracker.log_evaluation(_flat(result), figures, asdict(result), to_parquet(samples))
    keep_result(store, key, result)
    _tell(result)
    return result


def _tell(result: Evaluation) -> None:
    for name, estimate in result.metrics.items():
        log.info("%s %.4f [%.4f, %.4f]", name, estimate.value, estimate.low, estimate.high)


def _flat(result: Evaluation) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, estimate in result.metrics.items():
        flat |= {f"test.{name}": estimate.value, f"test.{name}.low": estimate.low, f"test.{name}.high": estimate.high}
    if result.calibration is not None:
        flat["test.calibration_error"] = result.calibration.error
    return flat
