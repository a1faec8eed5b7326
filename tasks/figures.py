"""The figures that a person looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def _canvas(*, rows: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=rows > 1)
    return figure, list(axes[:, 0])
