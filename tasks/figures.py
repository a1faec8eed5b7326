"""The figures that a person looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tasks.results import Calibration
from training.runs.events import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_figure(history: Sequence[Event]) -> Figure:
    """The training loss by step, and the learning rate under it."""
    figure, (above, below) = _canvas(rows=2, height=5.0)
    steps = [event.step for event in history]
    above.plot(steps, [event.values["loss"] for event in history], linewidth=1)
    above.set(ylabel="training loss", yscale="log")
    below.plot(steps, [event.values["learning_rate"] for event in history], linewidth=1, color="tab:orange")
    below.set(xlabel="step", ylabel="learning rate")
    return figure


def confusion_figure(counts: Sequence[Sequence[int]]) -> Figure:
    """Counts [label][predicted] as a heat map; a perfect model has only its diagonal."""
    figure, (axes,) = _canvas(rows=1, height=5.0)
    axes.imshow(counts, cmap="Blues")
    for label, row in enumerate(counts):
        for predicted, count in enumerate(row):
            if count:
                color = "white" if count > max(row) / 2 else "black"
                axes.text(predicted, label, str(count), ha="center", va="center", color=color, fontsize=8)
    ticks = range(len(counts))
    axes.set(xlabel="predicted", ylabel="label", xticks=ticks, yticks=ticks)
    return figure


def reliability_figure(calibration: Calibration) -> Figure:
    """The share that the model got right by how sure it was; a calibrated model lies on the diagonal. Under it, how
    many samples each point stands for."""
    figure, (above, below) = _canvas(rows=2, height=6.0)
    said = [one.confidence for one in calibration.bins]
    above.plot([0, 1], [0, 1], linewidth=1, color="gray", linestyle="dashed")
    above.plot(said, [one.accuracy for one in calibration.bins], marker="o", linewidth=1)
    above.set(ylabel="share right", title=f"expected calibration error {calibration.error:.4f}")
    below.bar(said, [one.num_samples for one in calibration.bins], width=0.02)
    below.set(xlabel="confidence", ylabel="samples", xlim=(0, 1))
    return figure


def _canvas(*, rows: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=rows > 1)
    return figure, list(axes[:, 0])
