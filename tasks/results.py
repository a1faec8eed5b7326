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
class Evaluation:
    """How good the model is. A function of the run key and the `[evaluate]` table alone."""

    run_key: str
    num_samples: int
    confidence: float
    metrics: dict[str, Estimate]
    confusion: tuple[tuple[int, ...], ...] | None = None
    """Counts [label][predicted], if the recipe scores `label` and `predicted`."""


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
