"""All that is known of where a version came from. Only what a document on the store, or MLflow, says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.lifecycle.champion import Entry
from tasks.lifecycle.model_file import KeptVersion
from tasks.provenance import Start
from training.data.manifest import ShardInfo
from training.runs.record import CheckpointRef, Continued, Departure, InitialWeights, Quarantined


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What the gate decided of the version, as it was judged last, or when it became champion."""

    decision_sha256: str
    passed: bool
    champion: str | None
    """The version that it was compared with."""
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The dataset version, and the order in which it was read."""

    name: str
    digest: str
    shards: Mapping[str, tuple[ShardInfo, ...]]
    """By split."""
    order_seed: int
    batch_size: int
    virtual_workers: int
    shuffle_window_shards: int


@dataclass(frozen=True, kw_only=True)
class Code:
    """What was computed by."""

    recipe: str
    recipe_source: str | None
    """Its digest; None (and no files) of a run that an earlier release began."""
    numerics_version: int | None
    sources: Mapping[str, str]
    """The sha256 of each source file, by its module."""
    starts: tuple[Start, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What happened in the run."""

    run_key: str
    generation: int
    steps: int
    state_sha256: str
    environment: Mapping[str, str]
    attempts: tuple[Mapping[str, Any], ...]
    """As tasks.attempts has them."""
    departures: tuple[Departure, ...]
    checkpoints: tuple[CheckpointRef, ...]
    """Those that are still kept; the last one is the result."""
    quarantined: tuple[Quarantined, ...]
    inexact: str | None
    """The setting by which it gives another result if it is done again."""
    initial: InitialWeights | None
    continued: Continued | None
    preset: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Of one version of a model."""

    kept: KeptVersion
    training: Training | None
    """None if the run was removed, or trained anew to other weights."""
    data: Data | None
    code: Code | None
    gate: Gate | None
    history: tuple[Entry, ...]
    """The changes by which it became champion."""
    is_champion: bool
    tags: Mapping[str, str]
    """Of the version in MLflow."""
    links: Mapping[str, str]
    unknown: tuple[str, ...]
    """What could not be found out, and why."""
