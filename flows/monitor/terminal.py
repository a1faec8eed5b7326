"""Views on a terminal: lines that are never longer than it is wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from flows.monitor import words
from flows.monitor.view import AlertView, NodeView, Overview, RunView
from infra.local.watch import ServiceStatus

Tone = Literal["plain", "strong", "soft", "good", "bad"]
CODES: dict[Tone, str] = {"plain": "", "strong": "1", "soft": "2", "good": "32", "bad": "31"}
TONES: dict[str, Tone] = {
    "training": "good",
    "finished": "good",
    "failed": "bad",
    "stalled": "bad",
    "recovering": "bad",
}
"""Of a run's states; the others are plain."""
BLOCKS = "▁▂▃▄▅▆▇█"
NAME_COLUMNS = 13


@dataclass(frozen=True)
class Line:
    text: str
    tone: Tone = "plain"

    def painted(self) -> str:
        code = CODES[self.tone]
        return f"\x1b[{code}m{self.text}\x1b[0m" if code and self.text else self.text


def run_lines(view: RunView, now: float, width: int) -> list[Line]:
    """All of a run."""
    found = [*_wrapped(words.lateness(view.at, now), width, "bad"), *_head(view, width)]
    for fact in words.facts(view, now):
        found += _named(fact.name, f"{fact.value}{f'  ({fact.note})' if fact.note else ''}", width)
    if len(view.curve) > 1:
        found += _named(
            "loss so far", sparkline(words.on_scale([point.loss for point in view.curve]), width - NAME_COLUMNS), width
        )
    if split := words.time_split(view):
        found += _named("time", ", ".join(f"{use} {words.percent(share)}" for use, share in split), width)
    if not view.is_over:
        found += _named("engine", view.engine, width)
    for note in view.notes:
        found += _named("note", note, width, "bad")
    found += _alerts(view.alerts, width)
    found += _nodes(view, now, width)
    found += _attempts(view, width)
    found += _links(view.links.items(), width)
    return found


def overview_lines(overview: Overview, now: float, width: int) -> list[Line]:
    """All runs, who waits, what fires."""
    found: list[Line] = []
    for run in overview.runs:
        found += [*_head(run, width), *_wrapped(words.in_short(run, now), width), Line("")]
    if not overview.runs:
        found += [Line("no run is at work, or was within the last hour", "soft"), Line("")]
    for waiting in overview.servers.waiting:
        text = f"{waiting.name} in {waiting.queue}, {waiting.state}, for {words.duration(waiting.seconds)}"
        found += _named("waits", text, width)
    found += _alerts(overview.servers.alerts, width)
    return found


def service_lines(services: Sequence[ServiceStatus], width: int) -> list[Line]:
    """A line for each; of one that is not well, where its log is."""
    found: list[Line] = []
    for service in services:
        state = service.state if service.healthy else f"NOT WELL ({service.state})"
        text = f"{state}  {service.url}" if service.healthy else f"{state}, log {service.log}"
        found += _named(service.name, text, width, "plain" if service.healthy else "bad")
    return found


def _head(view: RunView, width: int) -> Iterator[Line]:
    tone = TONES.get(view.state, "plain")
    state = view.state.upper()
    name = f"{words.shortened(view.model, max(8, width - len(state) - 16))}  {words.shortened(view.short_key)}"
    yield Line(f"{name}{state:>{width - len(name)}}", tone)
    if view.why:
        yield from _wrapped(words.shortened(view.why), width, "soft")
    share = min(1.0, view.step / view.goal_steps) if view.goal_steps else 0.0
    count = f"  {view.step:,}/{view.goal_steps:,}  {share:.0%}"
    yield Line(bar(share, width - len(count)) + count)


def _alerts(maybe_alerts: Sequence[AlertView] | None, width: int) -> Iterator[Line]:
    if maybe_alerts is None:
        yield from _named("alerts", "no Alertmanager answers here (docs/monitoring.md)", width, "soft")
    elif not maybe_alerts:
        yield from _named("alerts", "none fires", width)
    for alert in maybe_alerts or ():
        yield from _named("ALERT", f"{alert.name}: {alert.summary}: {alert.cause}", width, "bad")


def _nodes(view: RunView, now: float, width: int) -> Iterator[Line]:
    if not view.nodes:
        return
    yield Line("")
    rows: list[tuple[str, ...]] = [("rank", *words.RANK_COLUMNS)]
    rows += [(str(rank.rank), *words.rank_cells(rank, now)) for node in view.nodes for rank in node.ranks]
    table = iter(_table(rows, width))
    yield Line(next(table), "soft")
    for node in view.nodes:
        yield from _node(node, width)
        for _ in node.ranks:
            yield Line(next(table))
    if view.num_unasked_nodes:
        yield Line(f"and {view.num_unasked_nodes} more nodes", "soft")
    yield from _wrapped(words.RANK_NOTE, width, "soft")


def _node(node: NodeView, width: int) -> Iterator[Line]:
    text = f"node {node.node} at {words.shortened(node.address)}: {words.node_state(node)}"
    about = words.node_facts(node)
    yield from _wrapped(f"{text}{f'; {about}' if about else ''}", width, "strong" if node.is_answering else "bad")


def _attempts(view: RunView, width: int) -> Iterator[Line]:
    if view.attempts:
        yield Line("")
    for attempt in view.attempts:
        text = f"{words.attempt_beginning(attempt)}: {words.attempt_end(attempt, view)}"
        yield from _named(f"attempt {attempt.number}", text, width)


def _links(links: Iterable[tuple[str, str]], width: int) -> Iterator[Line]:
    yield Line("")
    for name, link in links:
        yield from _named(name, link, width, "soft")


def _named(name: str, text: str, width: int, tone: Tone = "plain") -> Iterator[Line]:
    """The text beside its name, and below that as far as it goes on."""
    lead = f"{words.shortened(name, NAME_COLUMNS - 1):{NAME_COLUMNS - 1}} "
    yield from _wrapped(words.shortened(text, 1000), width, tone, first=lead, rest=" " * NAME_COLUMNS)


def trouble_lines(text: str, width: int) -> list[Line]:
    return list(_wrapped(words.shortened(text, 1000), width, "bad"))


def _wrapped(text: str, width: int, tone: Tone = "plain", *, first: str = "", rest: str = "") -> Iterator[Line]:
    for line in textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False):
        yield Line(line, tone)


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns as wide as their widest cell; those that do not fit are left out, the last first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) > width:
        widths.pop()
    return ["  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=False)) for row in rows]


def bar(share: float, width: int) -> str:
    filled = round(share * max(0, width))
    return "█" * filled + "░" * (width - filled)


def sparkline(numbers: Sequence[float], width: int) -> str:
    """Of as many as fit; what is not finite is a hole."""
    step = max(1, -(-len(numbers) // max(1, width)))
    shown = numbers[::step]
    finite = [number for number in shown if abs(number) < float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((n - low) * scale)] if abs(n) < float("inf") else " " for n in shown)
