"""What the stages hand to one another: small, JSON-able documents, so that stages need not know each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset version."""

    name: str
    digest: str
    num_train_samples: int
    num_test_samples: int
    num_shards: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What training gave: a function of the run key alone."""

    run_key: str
    step: int
    weights_sha256: str
    state_sha256: str


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over the held-out samples, and its bootstrap confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The held-out samples that have one value of a score, such as `label=3`."""

    name: str
    num_samples: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The samples of which the model was about equally sure."""

    num_samples: int
    confidence: float
    """The mean of what the model said, and the share that it got right."""
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether a classifier is as often right as it says."""

    error: float
    """The expected calibration error, from 0 (as it says) to 1."""
    bins: tuple[Bin, ...]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good the model is. A function of the run key and the `[evaluate]` table alone."""

    run_key: str
    num_samples: int
    confidence: float
    metrics: dict[str, Estimate]
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Counts [label][predicted], if the recipe scores `label` and `predicted`."""
    slices: tuple[Slice, ...] = ()
    calibration: Calibration | None = None
    """If the recipe scores `confidence` beside these."""
    scores_sha256: str
    """Of the Parquet file that holds each sample's scores, `runs/KEY/results/SHA256.parquet`."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """One version in the registry."""

    name: str
    version: str
    run_key: str
    weights_sha256: str
    model_sha256: str
    """Of the model file on the store (tasks.lifecycle.model_file)."""
    model_bytes: int
    aliases: tuple[str, ...]
    url: str


@dataclass(frozen=True, kw_only=True)
class PipelineResult:
    """What the whole chain gave."""

    dataset: Dataset
    model: TrainedModel
    evaluation: Evaluation
    registration: Registration
    links: dict[str, str]
