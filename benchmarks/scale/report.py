"""The model as tables: what an hour costs by number of nodes, and which limit is met where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.scale import lifted, model
from benchmarks.scale.limits import (
    SECOND,
    agent_nanoseconds_per_second,
    in_order,
    message_bytes,
    messages_per_second,
    start_messages,
)
from benchmarks.scale.model import Run, Traffic, start

NODE_COUNTS = tuple(1 << exponent for exponent in range(15))
SHOWN = (1, 16, 64, 256, 1_024, 4_096, 16_384)


def at(num_nodes: int) -> Run:
    return Run(num_nodes=num_nodes)


def as_markdown(points: Mapping[str, Any]) -> str:
    """What was counted of agents, and the model."""
    tables = (_counted(points["agents"]), _by_kind(model.KINDS), _by_kind(lifted.KINDS), _agents(), _limits())
    return "\n\n".join("\n".join(rows) for rows in tables)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(title: str) -> Iterator[str]:
    yield _row([title, *(f"{count:,}" for count in SHOWN)])
    yield _row(["---"] * (1 + len(SHOWN)))


def _counted(points: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield _row(
        [
            "agents; beat",
            "at rest, a second: looks (model), messages",
            "bytes of a message (model)",
            "CPU of an agent",
            "one is lost: requests of the record, places; pause",
            "it is back: the same",
            "at the start: record, places; refused",
        ]
    )
    yield _row(["---"] * 7)
    for point in points:
        count, rest = point["num_nodes"], point["rest"]
        looks = _num(rest["requests"], "record GET") / rest["seconds"]
        size = rest["message_bytes"] // max(1, rest["num_messages"])
        start = point["start"]["requests"]
        yield _row(
            [
                f"{count}; {point['beat_seconds']:g} s",
                f"{looks:.1f} ({count / model.POLL_SECONDS:.1f}), {rest['num_messages'] / rest['seconds']:.0f}",
                f"{size:,} ({message_bytes(count):,})" if size else "",
                f"{rest['agent_cpu_seconds'] / rest['seconds']:.1%}",
                *(_change(point[part]) if part in point else "" for part in ("lost", "back")),
                f"{_num(start, 'record')}, {_num(start, 'nodes')}; {_num(start, 'record PUT refused')}",
            ]
        )


def _change(found: Mapping[str, Any]) -> str:
    requests = found["requests"]
    return f"{_num(requests, 'record')}, {_num(requests, 'nodes')}; {found['pause_seconds']:.2f} s"


def _num(requests: Mapping[str, Sequence[int]], name: str) -> int:
    """Of a kind, or of a kind and method."""
    return sum(count[0] for found, count in requests.items() if found.startswith(name))


def _by_kind(kinds: dict[str, model.Kind]) -> Iterator[str]:
    yield from _header("an hour of … nodes: requests, bytes, dollars")
    for name, traffic in kinds.items():
        yield _row([name, *(_cell(traffic(at(count))) for count in SHOWN)])
    totals = [sum((traffic(at(count)) for traffic in kinds.values()), Traffic()) for count in SHOWN]
    yield _row(["**all**", *map(_cell, totals)])


def _cell(traffic: Traffic) -> str:
    return f"{_short(traffic.num_requests)}; {_short(traffic.num_bytes)}B; ${traffic.nanodollars / SECOND:,.2f}"


def _agents() -> Iterator[str]:
    yield from _header("between agents")
    yield _row(["messages a second", *(_short(messages_per_second(count)) for count in SHOWN)])
    traffic = [messages_per_second(count) * message_bytes(count) for count in SHOWN]
    yield _row(["bytes a second", *(f"{_short(count)}B" for count in traffic)])
    cores = [agent_nanoseconds_per_second(count) / SECOND for count in SHOWN]
    yield _row(["cores of each agent", *(f"{count:,.2f}" for count in cores)])
    yield _row(["messages until all are linked", *(_short(count * start_messages(count)) for count in SHOWN)])
    yield _row(["S3 at the start of all", *(_cell(start(at(count))) for count in SHOWN)])
    looks = [count / model.POLL_SECONDS for count in SHOWN]
    yield _row(["looks at the record a second", *(f"{count:,.1f}" for count in looks)])


def _limits() -> Iterator[str]:
    yield _row(["nodes at most", "what ends there", "lifted by"])
    yield _row(["---"] * 3)
    for most, limit in in_order(at(1)):
        yield _row([f"{most:,}", limit.name, limit.lifted_by])


def _short(count: int) -> str:
    """Three digits and a unit."""
    size = float(count)
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(size) < 1000:
            return f"{size:.3g} {unit}" if unit else f"{count} "
        size /= 1000
    return f"{size:,.0f} E"
