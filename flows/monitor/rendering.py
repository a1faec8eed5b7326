"""Views as pages: Jinja2 with all that comes from elsewhere escaped, no scripts, drawings as SVG."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from flows.monitor import words
from flows.monitor.view import Overview, RunView

PAGES = Path(__file__).with_name("pages")
REFRESH_SECONDS = 5
CURVE_WIDTH, CURVE_HEIGHT = 600.0, 90.0


def overview_html(overview: Overview) -> str:
    return _template("overview.html").render(overview=overview, now=time.time(), refresh=REFRESH_SECONDS)


def run_html(view: RunView) -> str:
    losses = [point.loss for point in view.curve]
    speeds = smoothed([point.samples_per_second or 0.0 for point in view.curve])
    scale = ", logarithmic" if words.is_logarithmic(losses) else ""
    curves = (
        (f"Loss{scale}", curve(view, losses, heights=words.on_scale(losses))),
        ("Samples per second", curve(view, speeds, heights=speeds, floor=0.0)),
    )
    return _template("run.html").render(
        view=view,
        now=time.time(),
        refresh=0 if view.is_over else REFRESH_SECONDS,
        curves=[(name, drawn) for name, drawn in curves if drawn is not None],
    )


def error_html(message: str) -> str:
    return _template("error.html").render(message=message, now=time.time(), refresh=0)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        undefined=StrictUndefined,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["words"] = words
    environment.tests["web"] = is_web
    return environment.get_template(name)


def is_web(link: str) -> bool:
    """Whether a page may link there: a name from elsewhere could be one that a browser would run."""
    return link.startswith(("http://", "https://"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line through what is finite, its ends in words, and where groups began."""

    points: str
    low: str
    high: str
    last: str
    marks: Sequence[float]


def smoothed(numbers: Sequence[float]) -> list[float]:
    """Each the mean of it and those before it that lie within a fortieth of the drawing."""
    count = max(1, len(numbers) // 40)
    windows = (numbers[max(0, place - count + 1) : place + 1] for place in range(len(numbers)))
    return [sum(window) / len(window) for window in windows]


def curve(
    view: RunView, numbers: Sequence[float], *, heights: Sequence[float], floor: float | None = None
) -> Curve | None:
    """These numbers, drawn as high, from `floor` up or from the least. None if there are not two points to connect."""
    found = [
        (point.step, number, height)
        for point, number, height in zip(view.curve, numbers, heights, strict=True)
        if isfinite(number)
    ]
    if len(found) < 2:
        return None
    low = min(height for *_, height in found) if floor is None else floor
    end, span = found[-1][0], (max(height for *_, height in found) - low) or 1.0
    points = " ".join(
        f"{CURVE_WIDTH * step / end:.1f},{CURVE_HEIGHT * (1 - (height - low) / span):.1f}" for step, _, height in found
    )
    return Curve(
        points=points,
        low=words.figure(min(number for _, number, _ in found)),
        high=words.figure(max(number for _, number, _ in found)),
        last=words.figure(found[-1][1]),
        marks=[CURVE_WIDTH * one.from_step / end for one in view.attempts if 0 < one.from_step <= end],
    )
