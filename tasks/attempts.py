"""The attempts at a run as a table: which ranks trained from which step, and why they stopped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

from training.runs.events import Event
from training.runs.record import Record

COLUMNS = ("token", "began", "ranks", "from_step", "from", "why_it_ended")
TAG_CHARACTERS = 1000  # MLflow takes 8000


def attempts_table(record: Record, begun: Mapping[int, Event]) -> list[dict[str, Any]]:
    """One row per group that trained, oldest first. `begun` has each token's event of its beginning."""
    tokens = [token for token, step in enumerate(record.resume_steps, start=1) if step is not None]
    return [_row(record, token, begun.get(token), is_last=token == tokens[-1]) for token in tokens]


def _row(record: Record, token: int, maybe_begun: Event | None, *, is_last: bool) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"token": token, "from_step": record.resume_steps[token - 1], "why_it_ended": _end(record, token, is_last)}
    if maybe_begun is not None:  # a rank may have died before it could tell
        began = datetime.fromtimestamp(maybe_begun.time, UTC).isoformat(timespec="milliseconds")
        values = maybe_begun.values
        row |= {"began": began, "ranks": values["world_size"], "from": values.get("source", "start")}
    return row


def _end(record: Record, token: int, is_last: bool) -> str:
    causes = [f"node {left.node}: {left.cause}" for left in record.departures if left.token == token]
    if is_last and record.failure is not None:
        causes.append(record.failure.message)
    if causes:
        return "; ".join(causes)
    if not is_last:
        return "the nodes regrouped"
    return "finished" if record.result is not None else ""


def attempt_tags(record: Record) -> dict[str, str]:
    """What is told at a glance: how often it was begun, how many nodes left, and why the last one did."""
    tags = {
        "unbroken.attempts": str(len(record.attempt_starts)),
        "unbroken.departures": str(len(record.departures)),
    }
    if record.departures:
        tags["unbroken.last_departure"] = record.departures[-1].cause[:TAG_CHARACTERS]
    if record.failure is not None:
        tags["unbroken.failure"] = record.failure.message[:TAG_CHARACTERS]
    return tags


def begun_by_token(events: Collection[Event]) -> dict[int, Event]:
    return {event.token: event for event in events if event.kind == "attempt"}
