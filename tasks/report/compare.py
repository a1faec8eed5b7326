"""Runs side by side: their curves in one figure, and what they differ in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from tasks.report.canvas import RUN_COLOURS, canvas, short, style, svg
from tasks.report.facts import RunFacts
from tasks.report.figures import MAX_METRICS, Curve, curve, draw, log_if_wide, of_steps, validations
from training.errors import UserError

MAX_RUNS = len(RUN_COLOURS)
CURVES = {
    "loss": ("loss", "training loss"),
    "rate": ("learning_rate", "learning rate"),
    "norm": ("grad_norm", "gradient norm"),
    "throughput": ("samples_per_second", "samples per second"),
}


@dataclass(frozen=True)
class Row:
    """What the runs have of one thing."""

    name: str
    cells: tuple[str, ...]
    """One for each run."""

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def require_comparable(keys: Sequence[str]) -> None:
    """Raises `UserError` for more runs than a person can tell apart."""
    if len(keys) > MAX_RUNS:
        raise UserError(f"{len(keys)} runs: a report tells {MAX_RUNS} apart at most")


def labels_of(runs: Sequence[RunFacts]) -> list[str]:
    """What a run is called in a figure."""
    return [f"{short(run.name)} {run.run_key[:8]}" for run in runs]


def compared(runs: Sequence[RunFacts]) -> Sequence[Row]:
    """What decides a run, or where it ran: only that in which they differ."""
    tables = [_settings(run) for run in runs]
    names = sorted({name for table in tables for name in table})
    rows = [Row(name, tuple(table.get(name, "–") for table in tables)) for name in names]
    return [row for row in rows if row.differs]


def median_speed(run: RunFacts) -> float | None:
    """Samples per second, of the steps that count."""
    points = [value for _, value in of_steps(run.steps, "samples_per_second")]
    return median(points) if points else None


def last_loss(run: RunFacts) -> float | None:
    points = of_steps(run.steps, "loss")
    return points[-1][1] if points else None


def _settings(run: RunFacts) -> dict[str, str]:
    found = {f"preset: {name}": _shown(value) for name, value in run.preset.items()}
    found |= {f"environment: {name}": value for name, value in run.environment.items()}
    if run.data is not None:
        found["dataset version"] = run.data.digest[:16]
    if run.code is not None:
        found["recipe source"] = (run.code.recipe_source or "not kept")[:16]
        found["numerics"] = str(run.code.numerics_version)
    if run.initial is not None:
        found["initial weights"] = run.initial.weights_sha256[:16]
    return found


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def figures_side_by_side(runs: Sequence[RunFacts]) -> Mapping[str, str]:
    """SVG by name."""
    names = sorted({name for run in runs for name in validations(run.steps)})[:MAX_METRICS]
    wanted = {figure: (label, partial(_curve, name)) for figure, (name, label) in CURVES.items()}
    for number, name in enumerate(names):
        wanted[f"validation{number}"] = (f"held-out {name}", partial(_held_out, name))
    with style():
        return {
            figure: made
            for figure, (label, points) in wanted.items()
            if (made := _overlaid(figure, label, [curve(points(run)) for run in runs], labels_of(runs))) is not None
        }


def _curve(name: str, run: RunFacts) -> Sequence[tuple[float, float]]:
    return of_steps(run.steps, name)


def _held_out(name: str, run: RunFacts) -> Sequence[tuple[float, float]]:
    return validations(run.steps).get(name, [])


def _overlaid(figure_name: str, label: str, curves: Sequence[Curve], labels: Sequence[str]) -> str | None:
    drawn = [one for one in curves if len(one.steps)]
    if not drawn:
        return None
    figure, (axes,) = canvas(rows=1, height=3.0)
    for colour, one, name in zip(RUN_COLOURS.values(), curves, labels, strict=False):
        if len(one.steps):
            draw(axes, one, colour=colour, label=name)
    if figure_name in ("loss", "norm"):
        log_if_wide(axes, drawn)
    if figure_name == "throughput":
        axes.set_ylim(0, None)
    axes.legend()
    axes.set(xlabel="step", ylabel=short(label))
    return svg(figure, figure_name)
