"""From facts to HTML. Whatever a page says comes in by a template, which escapes it; the figures are our own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.report.canvas import COLOURS, RUN_COLOURS
from tasks.report.compare import compared, figures_side_by_side, last_loss, median_speed
from tasks.report.facts import RunFacts
from tasks.report.figures import figures_of, num_not_finite
from training.runs.goodput import USES

if TYPE_CHECKING:
    from jinja2 import Environment

GENERATOR = "unbroken report"
TEMPLATES = Path(__file__).with_name("templates")
DARK = {
    "training": "#58a6e8",
    "validation": "#34c49a",
    "redone": "#ff8147",
    "recovery": "#f0b541",
    "waiting": "#818c98",
    "checkpoint": "#e39cc5",
    "nodes": "#6fb9e6",
    "ink": "#e6eaee",
    "soft": "#98a3af",
    "line": "#2b333c",
    "card": "#1a2027",
}
DARK_RUNS = dict(
    zip(
        RUN_COLOURS,
        ("#58a6e8", "#f0b541", "#34c49a", "#e39cc5", "#ff8147", "#8fd0f5", "#c9b94a", "#98a3af"),
        strict=True,
    )
)
USE_WORDS = {
    "productive": "steps that count",
    "redone": "steps that were done again later",
    "recovery": "from a group's last step to the next one's first, the state kept in memory",
    "waiting": "the same, with no state in memory; and the start",
    "checkpoint": "between two steps of a group: checkpoints, or too little to tell",
    "validation": "scores of held-out samples on the way",
}
USE_COLOURS = {"productive": "training"}


def page_of(facts: RunFacts) -> str:
    """The report of one run."""
    return _render(
        "run.html",
        run=facts,
        figures=_trusted(figures_of(facts)),
        uses=[_use(facts, use) for use in USES],
        sources=_sources(facts),
        metrics=_metrics(facts),
        tiles=list(_tiles(facts)),
        num_not_finite=num_not_finite(facts.steps),
    )


def page_of_several(runs: Sequence[RunFacts]) -> str:
    """The report of runs side by side."""
    return _render(
        "compare.html",
        runs=runs,
        summary=[
            {"run": run, "colour": colour, "loss": last_loss(run), "speed": median_speed(run)}
            for run, colour in zip(runs, RUN_COLOURS, strict=False)
        ],
        figures=_trusted(figures_side_by_side(runs)),
        table=compared(runs),
        metrics=[(name, [_metrics(run).get(name) for run in runs]) for name in _metric_names(runs)],
    )


def is_report(path: Path) -> bool:
    """Whether a file is one of these, and may be replaced."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(2000)


def _render(template: str, **values: Any) -> str:
    text = (
        _environment()
        .get_template(template)
        .render(generator=GENERATOR, light=COLOURS | RUN_COLOURS, dark=DARK | DARK_RUNS, **values)
    )
    return "\n".join(line for line in (line.rstrip() for line in text.splitlines()) if line) + "\n"


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"moment": moment, "duration": duration, "number": number, "share": share}
    return made


def _trusted(figures: Mapping[str, str]) -> dict[str, Any]:
    """matplotlib escaped what is in them."""
    from markupsafe import Markup

    trusted: dict[str, Any] = {}
    for name, text in figures.items():
        trusted[name] = Markup(text)  # nosec B704 # as above
    return trusted


def moment(seconds: float | None) -> str:
    """A time since 1970, in UTC."""
    if seconds is None:
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 2 * 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float) -> str:
    """With four digits that tell something."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def share(value: float) -> str:
    return f"{value:.1%}"


def _tiles(facts: RunFacts) -> Iterable[tuple[str, str]]:
    goal = f" of {facts.goal_steps:,}" if facts.goal_steps is not None and facts.state != "finished" else ""
    yield f"{facts.steps[-1].step if facts.steps else 0:,}{goal}", "steps"
    yield duration(facts.wall_seconds), "from the first event to the last"
    yield share(facts.goodput.share), "goodput: time in steps that count"
    yield f"{sum(group.began_at is not None for group in facts.groups)}", "groups that trained"
    yield f"{len(facts.departures)}", "times a node failed or was lost"
    if facts.evaluation is not None and facts.evaluation.metrics:
        name, estimate = next(iter(facts.evaluation.metrics.items()))
        yield number(estimate.value), f"{name} on {facts.evaluation.num_samples:,} held-out samples"


def _use(facts: RunFacts, use: Any) -> dict[str, Any]:
    seconds, wall = facts.goodput.seconds[use], facts.goodput.wall_seconds
    return {
        "name": use,
        "colour": USE_COLOURS.get(use, use),
        "seconds": seconds,
        "share": seconds / wall if wall else 0.0,
        "words": USE_WORDS[use],
    }


def _metrics(facts: RunFacts) -> dict[str, Any]:
    return dict(facts.evaluation.metrics) if facts.evaluation is not None else {}


def _metric_names(runs: Sequence[RunFacts]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _metrics(run)))


def _sources(facts: RunFacts) -> list[tuple[str, str]]:
    return sorted(facts.code.sources.items()) if facts.code is not None else []
