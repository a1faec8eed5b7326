"""Goodput over node counts as an SVG, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recovery.scenarios import GPUS_PER_NODE, LLAMA3_GOODPUT_ABOVE, LLAMA3_NODES, NODE_COUNTS, Point

# Fixed salt: else the ids in the file are random. No font is embedded: text stays text.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "unbroken",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
}
COLOURS = {
    "restart in minutes": "#b2182b",
    "restart in seconds": "#ef8a62",
    "survivors, shrink": "#67a9cf",
    "survivors, hot spares": "#2166ac",
    "survivors, a copy always lives": "#1b7837",
}
TICKS = (16, 128, 1024, 2048, 16_384, 131_072)


def draw(points: Sequence[Point], path: Path) -> None:
    """Lines are the simulation, crosses the closed form."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for scenario, colour in COLOURS.items():
            _line(axes, [point for point in points if point.scenario == scenario], colour)
        _published(axes)
        _decorate(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _line(axes: Axes, points: Sequence[Point], colour: str) -> None:
    nodes = [point.num_nodes for point in points]
    axes.plot(nodes, [point.simulated for point in points], color=colour, label=points[0].scenario)
    axes.plot(nodes, [point.estimated for point in points], color=colour, linestyle="", marker="x", markersize=5)


def _published(axes: Axes) -> None:
    """A lower bound: an arrow up from it."""
    place = (LLAMA3_NODES, LLAMA3_GOODPUT_ABOVE)
    axes.plot(*place, color="black", linestyle="", marker=10, markersize=9)
    axes.annotate("Llama 3: above 90 %", place, xytext=(-8, -16), textcoords="offset points", ha="right")


def _decorate(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(TICKS, [f"{count:,}" for count in TICKS])
    axes.set_xlim(NODE_COUNTS[0], NODE_COUNTS[-1])
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"nodes of {GPUS_PER_NODE} GPUs")
    axes.set_ylabel("goodput (line: simulated, ×: closed form)")
    axes.grid(color="#dddddd")
    axes.legend(loc="lower left", frameon=False)
