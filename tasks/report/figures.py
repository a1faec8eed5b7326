"""The figures of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.report.canvas import COLOURS, WIDE_INCHES, canvas, short, style, svg
from tasks.report.facts import RunFacts
from training.runs.events import Event
from training.runs.system import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MAX_POINTS = 400
"""Of a curve; of more steps, each point stands for several, and a band shows the least and the greatest."""
MAX_METRICS = 4
MAX_LABELS = 30
MAX_BARS = 24
MAX_NODE_LINES = 8
LINE_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """Values by step. What is not finite is left out."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def is_thinned(self) -> bool:
        return bool((self.low != self.high).any())


def curve(points: Sequence[tuple[float, float]]) -> Curve:
    """As many points as a figure can show."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    finite = table[np.isfinite(table[:, 1])]
    parts = np.array_split(finite, min(len(finite), MAX_POINTS)) if len(finite) else []
    return Curve(
        steps=np.array([part[-1, 0] for part in parts]),
        values=np.array([part[:, 1].mean() for part in parts]),
        low=np.array([part[:, 1].min() for part in parts]),
        high=np.array([part[:, 1].max() for part in parts]),
    )


def of_steps(steps: Sequence[Event], name: str) -> list[tuple[float, float]]:
    """What the steps tell under a name. Steps of older releases do not tell all."""
    return [(event.step, float(event.values[name])) for event in steps if name in event.values]


def num_not_finite(steps: Sequence[Event]) -> int:
    """Losses and gradient norms that no curve can show."""
    return sum(not math.isfinite(value) for name in ("loss", "grad_norm") for _, value in of_steps(steps, name))


def validations(steps: Sequence[Event]) -> dict[str, list[tuple[float, float]]]:
    """The means over the held-out samples on the way, by metric."""
    found: dict[str, list[tuple[float, float]]] = {}
    for event in steps:
        for name, mean in (event.values.get("validation") or {}).items():
            found.setdefault(name, []).append((event.step, float(mean)))
    return {name: found[name] for name in sorted(found)}


def figures_of(facts: RunFacts) -> Mapping[str, str]:
    """SVG by name, of what there is data for."""
    makers: dict[str, Callable[[RunFacts], Figure | None]] = {
        "loss": _loss,
        "validation": _validation,
        "rate": lambda run: _single(run, "learning_rate", "learning rate"),
        "norm": lambda run: _single(run, "grad_norm", "gradient norm", log=True),
        "throughput": _throughput,
        "timeline": _timeline,
        "system": _system,
        "slices": _slices,
        "reliability": _reliability,
        "confusion": _confusion,
    }
    with style():
        made = {name: make(facts) for name, make in makers.items()}
        return {name: svg(figure, name) for name, figure in made.items() if figure is not None}


def draw(axes: Axes, found: Curve, *, colour: str, label: str | None = None, line: str = "-") -> None:
    """A line, and a band if its points stand for several steps each."""
    axes.plot(found.steps, found.values, color=colour, label=label, linestyle=line)
    if found.is_thinned:
        axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.18, linewidth=0)


def log_if_wide(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis, where a linear one would hide most of it."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low = min(float(one.low.min()) for one in curves)
    if low > 0 and max(float(one.high.max()) for one in curves) / low > 20:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _loss(facts: RunFacts) -> Figure | None:
    found = curve(of_steps(facts.steps, "loss"))
    if not len(found.steps):
        return None
    figure, (axes,) = canvas(rows=1, height=3.0)
    draw(axes, found, colour=COLOURS["training"], label="training")
    shown = [found]
    held_out = validations(facts.steps).get("loss")
    if held_out:
        shown.append(curve(held_out))
        axes.plot(
            shown[1].steps, shown[1].values, color=COLOURS["validation"], marker="o", markersize=3.5, label="held out"
        )
        axes.legend()
    log_if_wide(axes, [one for one in shown if len(one.steps)])
    axes.set(xlabel="step", ylabel="loss")
    return figure


def _validation(facts: RunFacts) -> Figure | None:
    found = {name: curve(points) for name, points in validations(facts.steps).items() if name != "loss"}
    drawn = [(name, one) for name, one in found.items() if len(one.steps)][:MAX_METRICS]
    if not drawn:
        return None
    figure, rows = canvas(rows=len(drawn), height=max(3.0, 1.7 * len(drawn)))
    for axes, (name, one) in zip(rows, drawn, strict=True):
        axes.plot(one.steps, one.values, color=COLOURS["validation"], marker="o", markersize=3.5)
        axes.set(ylabel=short(name))
    rows[-1].set(xlabel="step")
    return figure


def _single(facts: RunFacts, name: str, label: str, *, log: bool = False) -> Figure | None:
    found = curve(of_steps(facts.steps, name))
    if not len(found.steps):
        return None
    figure, (axes,) = canvas(rows=1, height=3.0)
    draw(axes, found, colour=COLOURS["training"])
    if log:
        log_if_wide(axes, [found])
    axes.set(xlabel="step", ylabel=label)
    return figure


def _throughput(facts: RunFacts) -> Figure | None:
    found = curve(of_steps(facts.steps, "samples_per_second"))
    if not len(found.steps):
        return None
    figure, (axes,) = canvas(rows=1, height=3.0)
    draw(axes, found, colour=COLOURS["training"])
    for left in facts.departures:
        axes.axvline(left.step, color=COLOURS["ink"], linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="samples per second", ylim=(0, None))
    return figure


def time_unit(seconds: float) -> tuple[float, str]:
    """In which unit a duration is told: how many seconds it has, and its name."""
    if seconds < 180:
        return 1.0, "s"
    return (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _timeline(facts: RunFacts) -> Figure | None:
    """How far the run was, and which nodes trained it, by the time since its first event."""
    if facts.begun_at is None or not facts.wall_seconds:
        return None
    divisor, unit = time_unit(facts.wall_seconds)
    begun = facts.begun_at

    def at(moment: float) -> float:
        return (moment - begun) / divisor

    figure, (above, below) = canvas(rows=2, height=4.4, width=WIDE_INCHES, height_ratios=(3, 1.3))
    _progress(above, facts, at)
    _nodes(below, facts, at)
    below.set(xlabel=f"time since the first event ({unit})", xlim=(0, 1.01 * facts.wall_seconds / divisor))
    return figure


def _progress(axes: Axes, facts: RunFacts, at: Callable[[float], float]) -> None:
    begins = sorted(group.began_at for group in facts.groups if group.began_at is not None)
    for events, colour, label in (
        (facts.redone, COLOURS["redone"], "steps done again later"),
        (facts.steps, COLOURS["training"], "steps that count"),
    ):
        lines = _broken(sorted((event.time, float(event.step)) for event in events), begins)
        for number, line in enumerate(lines):
            axes.plot(
                [at(moment) for moment, _ in line],
                [step for _, step in line],
                color=colour,
                linewidth=2.2,
                solid_capstyle="round",
                label=None if number else label,
            )
    if facts.saved:
        axes.plot(
            [at(one.at) for one in facts.saved],
            [one.step for one in facts.saved],
            color=COLOURS["checkpoint"],
            marker="D",
            markersize=4.5,
            linestyle="none",
            label="checkpoint proven",
        )
    top = max((event.step for event in (*facts.steps, *facts.redone)), default=1)
    _mark_departures(axes, facts, at, top=1.1 * top)
    axes.set(ylabel="step", ylim=(0, 1.22 * top))
    axes.legend(loc="upper left", ncols=4, bbox_to_anchor=(0, 1.16))


def _broken(points: Sequence[tuple[float, float]], begins: Sequence[float]) -> list[list[tuple[float, float]]]:
    """A line per group, of as many points as can be told apart."""
    every = math.ceil(len(points) / (2 * MAX_POINTS)) if points else 1
    lines: list[list[tuple[float, float]]] = []
    last_group = -1
    for number, point in enumerate(points):
        group = int(np.searchsorted(begins, point[0], side="right"))
        if group != last_group:
            if lines:
                lines[-1].append(points[number - 1])
            lines.append([point])
        elif number % every == 0 or number == len(points) - 1:
            lines[-1].append(point)
        last_group = group
    return lines


def _mark_departures(axes: Axes, facts: RunFacts, at: Callable[[float], float], *, top: float) -> None:
    """Each moment once, with the numbers that the table has."""
    by_moment: dict[float, list[int]] = {}
    for left in facts.departures:
        if left.at is not None:
            by_moment.setdefault(left.at, []).append(left.number)
    for moment, numbers in sorted(by_moment.items()):
        axes.axvline(at(moment), color=COLOURS["ink"], linewidth=0.9, linestyle=":")
        text = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
        axes.text(
            at(moment),
            top,
            text,
            ha="center",
            va="center",
            fontsize=8,
            color=COLOURS["card"],
            bbox={"boxstyle": "round,pad=0.3", "facecolor": COLOURS["ink"], "edgecolor": "none"},
        )


def _nodes(axes: Axes, facts: RunFacts, at: Callable[[float], float]) -> None:
    from matplotlib.ticker import MaxNLocator

    for group in facts.groups:
        if group.began_at is None or group.ended_at is None or group.nodes is None:
            continue
        begun, ended = at(group.began_at), at(group.ended_at)
        axes.bar(
            begun,
            group.nodes,
            width=ended - begun,
            align="edge",
            color=COLOURS["nodes"],
            alpha=0.75,
            edgecolor=COLOURS["card"],
            linewidth=0.8,
        )
    for left in facts.departures:
        if left.at is not None:
            axes.axvline(at(left.at), color=COLOURS["ink"], linewidth=0.9, linestyle=":")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    axes.set(ylabel="nodes", ylim=(0, 1.1 * max((group.nodes or 1 for group in facts.groups), default=1)))


def _system(facts: RunFacts) -> Figure | None:
    if facts.begun_at is None or not any(len(samples) > 1 for samples in facts.samples.values()):
        return None
    last = max(sample.time for samples in facts.samples.values() for sample in samples)
    divisor, unit = time_unit(last - facts.begun_at)
    figure, (cpu, memory, network) = canvas(rows=3, height=5.4, width=WIDE_INCHES)
    for number, (node, samples) in enumerate(facts.samples.items()):
        is_told_apart = len(facts.samples) <= MAX_NODE_LINES
        drawing: dict[str, Any] = {
            "color": COLOURS["nodes"],
            "linestyle": LINE_STYLES[number % len(LINE_STYLES)] if is_told_apart else "-",
            "alpha": 1.0 if is_told_apart else 0.5,
            "marker": ("", "o", "s", "^", "D", "v", "x", "+")[number] if is_told_apart else "",
            "markersize": 3.5,
            "label": f"node {node}" if is_told_apart else None,
        }
        times = [(sample.time - facts.begun_at) / divisor for sample in samples]
        cpu.plot(times, [sample.cpu_utilization_percentage for sample in samples], **drawing)
        memory.plot(times, [sample.system_memory_usage_percentage for sample in samples], **drawing)
        rates = [
            max(0.0, _traffic(after) - _traffic(before)) / max(1e-3, after.time - before.time)
            for before, after in pairwise(samples)
        ]
        network.plot(times[1:], rates, **drawing)
    if len(facts.samples) <= MAX_NODE_LINES:
        cpu.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))
    cpu.set(ylabel="processors (%)", ylim=(0, 105))
    memory.set(ylabel="memory (%)", ylim=(0, 105))
    network.set(ylabel="network (MiB/s)", ylim=(0, None), xlabel=f"time since the first event ({unit})")
    return figure


def _traffic(sample: Sample) -> float:
    return sample.network_receive_megabytes + sample.network_transmit_megabytes


def _slices(facts: RunFacts) -> Figure | None:
    """The first metric, slice by slice, beside all samples."""
    evaluation = facts.evaluation
    if evaluation is None or not evaluation.slices or not evaluation.metrics:
        return None
    metric = next(iter(evaluation.metrics))
    shown = [one for one in evaluation.slices if metric in one.metrics][:MAX_BARS]
    figure, (axes,) = canvas(rows=1, height=max(3.0, 0.24 * len(shown) + 0.9))
    for row, one in enumerate(shown):
        estimate = one.metrics[metric]
        axes.plot([estimate.low, estimate.high], [row, row], color=COLOURS["validation"], linewidth=2, alpha=0.5)
        axes.plot(estimate.value, row, color=COLOURS["validation"], marker="o", markersize=4.5)
    axes.axvline(evaluation.metrics[metric].value, color=COLOURS["ink"], linewidth=0.9, linestyle=":")
    labels = [f"{short(one.name)} ({one.num_samples})" for one in shown]
    axes.set_yticks(range(len(shown)), labels=labels)
    axes.set(xlabel=f"{short(metric)}, {evaluation.confidence:.0%} interval; dotted: all samples")
    axes.invert_yaxis()
    return figure


def _reliability(facts: RunFacts) -> Figure | None:
    found = facts.evaluation.calibration if facts.evaluation is not None else None
    if found is None or not found.bins:
        return None
    figure, (above, below) = canvas(rows=2, height=4.0, height_ratios=(3, 1))
    said = [one.confidence for one in found.bins]
    above.plot([0, 1], [0, 1], color=COLOURS["soft"], linewidth=0.9, linestyle=":")
    above.plot(said, [one.accuracy for one in found.bins], color=COLOURS["validation"], marker="o", markersize=4)
    above.set(ylabel="share right", ylim=(-0.03, 1.03))
    below.bar(said, [one.num_samples for one in found.bins], width=0.03, color=COLOURS["validation"], alpha=0.6)
    below.set(xlabel="how sure the model was", ylabel="samples", xlim=(-0.02, 1.02))
    return figure


def _confusion(facts: RunFacts) -> Figure | None:
    counts = facts.evaluation.confusion if facts.evaluation is not None else None
    if counts is None or not counts or len(counts) > MAX_LABELS:
        return None
    from matplotlib.patches import Rectangle

    figure, (axes,) = canvas(rows=1, height=4.0)
    for label, row in enumerate(counts):
        for predicted, count in enumerate(row):
            if not count:
                continue
            share = count / sum(row)
            axes.add_patch(
                Rectangle(
                    (predicted - 0.5, label - 0.5),
                    1,
                    1,
                    facecolor=COLOURS["validation"] if predicted == label else COLOURS["redone"],
                    alpha=0.15 + 0.6 * share,
                    linewidth=0,
                )
            )
            if len(counts) <= MAX_LABELS // 2:
                axes.text(predicted, label, str(count), ha="center", va="center", fontsize=8)
    half = len(counts) - 0.5
    axes.set(xlabel="predicted", ylabel="label", xlim=(-0.5, half), ylim=(half, -0.5), aspect="equal")
    axes.set_xticks(range(len(counts)))
    axes.set_yticks(range(len(counts)))
    axes.grid(visible=False)
    return figure
