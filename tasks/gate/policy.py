"""What a challenger must show, from mlflow/gate.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.documents import read_toml
from training.errors import UserError
from training.preset_file import build


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The challenger's own mean must lie within bounds."""

    metric: str = ""
    """A metric of the recipe; by default its first."""
    slices: tuple[str, ...] = ()
    """Each slice by itself: all of a field (`label`), or one (`label=3`). By default, all samples together."""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise ValueError("needs at_least, at_most or both")


@dataclass(frozen=True, kw_only=True)
class NotWorse:
    """The challenger must be shown to be worse than the champion by no more than a margin."""

    metric: str = ""
    slices: tuple[str, ...] = ()
    margin: float | None = None
    """In the metric's own unit, or in percent of the champion's mean."""
    margin_percent: float | None = None

    def __post_init__(self) -> None:
        margins = [margin for margin in (self.margin, self.margin_percent) if margin is not None]
        if len(margins) != 1 or margins[0] < 0:
            raise ValueError("needs either margin or margin_percent, not negative")


@dataclass(frozen=True, kw_only=True)
class Better:
    """The challenger must be shown to be better than the champion."""

    metric: str = ""
    slices: tuple[str, ...] = ()
    by: float = 0.0
    """By more than so much, in the metric's own unit."""

    def __post_init__(self) -> None:
        if self.by < 0:
            raise ValueError("by must not be negative")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """All that is required of one model's challengers."""

    confidence: float = 0.95
    """Of each comparison with the champion, one-sided."""
    resamples: int = 2000
    """Of the bootstrap."""
    min_slice_samples: int = 20
    """A slice of fewer samples is not judged."""
    require_ledger: bool = False
    """That the training read what its order says is proven anew (as by `unbroken data verify-run`)."""
    require_drill: bool = False
    """A green drill of the same recipe, configuration and code is attached to the version (docs/drill.md)."""
    threshold: tuple[Threshold, ...] = ()
    not_worse: tuple[NotWorse, ...] = ()
    better: tuple[Better, ...] = ()

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ValueError("confidence must lie between 0.5 and 1")
        if self.resamples < 1 / (1 - self.confidence) * 10:
            raise ValueError("resamples must be at least 10 / (1 - confidence)")
        if self.min_slice_samples < 1:
            raise ValueError("min_slice_samples must be at least 1")


def load_policy(path: Path, model: str) -> Policy:
    """What [models.NAME] says of this model, else what [default] says.

    Raises `UserError` naming the file and the key. All tables are checked, also those of other models.
    """
    document = read_toml(path)
    try:
        return parse_policy(document, model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_policy(document: Mapping[str, Any], model: str) -> Policy:
    unknown = sorted(set(document) - {"default", "models"})
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}: a policy has [default] and [models.NAME]")
    if "default" not in document:
        raise UserError("missing table [default]")
    models = document.get("models", {})
    if not isinstance(models, Mapping):
        raise UserError("models must be a table of tables, as in [models.digits]")
    policies = {name: _policy(table, where=f"models.{name}") for name, table in models.items()}
    return policies.get(model) or _policy(document["default"], where="default")


def _policy(table: Any, *, where: str) -> Policy:
    if not isinstance(table, Mapping):
        raise UserError(f"{where} must be a table")
    kinds: dict[str, Any] = {"threshold": Threshold, "not_worse": NotWorse, "better": Better}
    rules = {}
    for name in kinds.keys() & table.keys():
        if not isinstance(table[name], list):
            raise UserError(f"{where}.{name} must be a list of tables, as in [[{where}.{name}]]")
        rules[name] = [
            build(kinds[name], rule, where=f"{where}.{name}[{place}]") for place, rule in enumerate(table[name])
        ]
    return build(Policy, {**table, **rules}, where=where)
