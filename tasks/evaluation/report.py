"""From scores to what a person and the registry are told: intervals, slices, calibration, confusion."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.samples import Samples
from tasks.evaluation.statistics import bootstrap, by_record, calibration, values_of
from tasks.results import Calibration, Estimate, Evaluation, Slice
from training.config import EvaluateConfig
from training.errors import UserError

log = logging.getLogger(__name__)

MAX_SLICES = 100
"""A score of more values tells no slices apart: each would be of a few samples."""


def summarize(samples: Samples, config: EvaluateConfig, run_key: str, scores_sha256: str) -> Evaluation:
    """Raises `UserError` if the recipe scores a `confidence` that is no probability."""
    records = samples.records()

    def estimates(mask: NDArray[np.bool_]) -> dict[str, Estimate]:
        return {
            name: bootstrap(
                by_record(samples.scores[name][mask], records[mask]),
                num_resamples=config.bootstrap_samples,
                confidence=config.confidence,
            )
            for name in samples.metrics
        }

    return Evaluation(
        run_key=run_key,
        num_samples=len(samples.ids),
        confidence=config.confidence,
        metrics=estimates(np.ones(len(samples.ids), dtype=np.bool_)),
        confusion=_confusion(samples),
        slices=tuple(
            Slice(name=name, num_samples=int(mask.sum()), metrics=estimates(mask))
            for name, mask in slices_of(samples).items()
        ),
        calibration=_calibration(samples),
        scores_sha256=scores_sha256,
    )


def slices_of(samples: Samples) -> Mapping[str, NDArray[np.bool_]]:
    """The samples that belong to each slice, by its name: `label=3`."""
    found: dict[str, NDArray[np.bool_]] = {}
    for field in samples.slices:
        column = samples.scores[field]
        values = values_of(column)
        if len(values) > MAX_SLICES:
            log.warning("%s has %d values: samples are not told apart by it", field, len(values))
            continue
        found |= {f"{field}={value}": column == value for value in values}
    return found


def _calibration(samples: Samples) -> Calibration | None:
    scores = samples.scores
    if not {"label", "predicted", "confidence"} <= scores.keys():
        return None
    confidence = scores["confidence"]
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise UserError("the recipe's scores() gives a `confidence` that is not between 0 and 1")
    return calibration(confidence, scores["label"] == scores["predicted"])


def _confusion(samples: Samples) -> tuple[tuple[int, ...], ...] | None:
    scores = samples.scores
    if not {"label", "predicted"} <= scores.keys():
        return None
    label, predicted = scores["label"].astype(np.int64), scores["predicted"].astype(np.int64)
    size = int(max(label.max(), predicted.max())) + 1
    counts = np.bincount(label * size + predicted, minlength=size * size).reshape(size, size)
    return tuple(tuple(int(count) for count in row) for row in counts)
