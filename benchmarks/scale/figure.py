"""What a run costs over node counts, as an SVG, the same bytes every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.recovery.figure import STYLE
from benchmarks.scale import lifted, model
from benchmarks.scale.limits import (
    BEATS_PER_SECOND,
    SECOND,
    agent_nanoseconds_per_second,
    idle_nanoseconds_per_second,
)
from benchmarks.scale.report import NODE_COUNTS, at

COLOURS = {
    "membership": "#b2182b",
    "samples": "#ef8a62",
    "events": "#67a9cf",
    "checkpoints": "#2166ac",
}
TICKS = (1, 16, 128, 1024, 16_384)


def draw(points: Mapping[str, Any], path: Path) -> None:
    """Left: dollars an hour, as it is (solid) and lifted (dashed). Right: cores of an agent; crosses are measured."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        money, cores = figure.subplots(1, 2)
        for kind, colour in COLOURS.items():
            for functions, line in ((model.KINDS, "-"), (lifted.KINDS, "--")):
                dollars = [functions[kind](at(count)).nanodollars / SECOND for count in NODE_COUNTS]
                money.plot(NODE_COUNTS, dollars, line, color=colour, label=kind if line == "-" else None)
        _decorate(money, "dollars an hour (dashed: lifted)")
        money.legend(loc="upper left", frameon=False)
        _cores(cores, points)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _cores(axes: Axes, points: Mapping[str, Any]) -> None:
    counts = [count for count in NODE_COUNTS if count > 1]
    for cores, line in ((agent_nanoseconds_per_second, "-"), (idle_nanoseconds_per_second, ":")):
        axes.plot(counts, [cores(count) / SECOND for count in counts], line, color="black")
    alone = points["messages"]
    _crosses(axes, [(point["num_nodes"], cores_alone(point)) for point in alone], "x", "alone, at rest")
    chosen = [point for point in alone if point["choose_microseconds"] is not None]
    idle = [(point["num_nodes"], cores_alone(point, "choose_microseconds")) for point in chosen]
    _crosses(axes, idle, "1", "alone, idle")
    one, *fleet = points["agents"]
    _crosses(axes, [(point["num_nodes"], cores_of_fleet(point, one)) for point in fleet], "+", "among others, at rest")
    axes.axhline(1.0, color="#b2182b", linewidth=0.8)
    _decorate(axes, "cores of an agent (dotted: idle; red: all it can have)")
    axes.legend(loc="upper left", frameon=False)


def _crosses(axes: Axes, places: Sequence[tuple[int, float]], marker: str, label: str) -> None:
    axes.plot(*zip(*places, strict=True), color="#2166ac", linestyle="", marker=marker, markersize=7, label=label)


def cores_alone(point: Mapping[str, Any], decision: str = "decide_microseconds") -> float:
    """Of an agent whose messages were measured one by one."""
    each = point[decision] + point["way_microseconds"]
    return float(BEATS_PER_SECOND * (point["tell_microseconds"] + (point["num_nodes"] - 1) * each) / 1e6)


def cores_of_fleet(point: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """Of an agent among many, with the messages of the beat as it is; and what `one` does that has no peer."""
    rest, alone = point["rest"], one["rest"]["agent_cpu_seconds"] / one["rest"]["seconds"]
    spent = rest["agent_cpu_seconds"] - alone * rest["seconds"]
    num_messages = rest["num_messages"] / point["num_nodes"]
    return float(alone + BEATS_PER_SECOND * (point["num_nodes"] - 1) * spent / num_messages)


def _decorate(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(TICKS, [f"{count:,}" for count in TICKS])
    axes.set_xlabel("nodes")
    axes.set_ylabel(title)
    axes.grid(color="#dddddd")
