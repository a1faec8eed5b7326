"""What the monitor tells of runs, for a terminal."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Mapping

NUMBERS = {
    "step": "step",
    "of": "goal_steps",
    "nodes": "group_nodes",
    "wanted": "wanted_nodes",
    "attempts": "attempts_total",
    "stepped": "step_timestamp_seconds",
    "saved": "checkpoint_timestamp_seconds",
    "is_active": "active",
}
COLUMNS = ("run", "model", "state", "step", "nodes", "attempts", "last step", "checkpoint", "productive")


def fetch(url: str) -> str:
    """The monitor's page; empty if it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=3) as reply:
            return str(reply.read().decode())
    except OSError:
        return ""


def rows(text: str, now: float | None = None) -> list[list[str]]:
    """One of `COLUMNS` for each run on the page."""
    from prometheus_client.parser import text_string_to_metric_families

    now = time.time() if now is None else now
    found: dict[str, dict[str, float]] = {}
    models: dict[str, str] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            run = sample.labels.get("run", "")
            if not sample.name.startswith("unbroken_run_") or not run:
                continue
            name = sample.name.removeprefix("unbroken_run_")
            if name == "info":
                models[run] = sample.labels["model"]
            use = sample.labels.get("use")
            found.setdefault(run, {})[f"{name} {use}" if use else name] = sample.value
    return [_row(run, models.get(run, ""), numbers, now) for run, numbers in found.items()]


def _row(run: str, model: str, numbers: Mapping[str, float], now: float) -> list[str]:
    value = {name: numbers.get(of, 0.0) for name, of in NUMBERS.items()}
    seconds = {name: spent for name, spent in numbers.items() if name.startswith("seconds ")}
    wall = sum(seconds.values())
    state = "failed" if "failed" in numbers else "at work" if value["is_active"] else "over"
    return [
        *(run, model, state),
        f"{value['step']:.0f}/{value['of']:.0f}",
        f"{value['nodes']:.0f}/{value['wanted']:.0f}",
        f"{value['attempts']:.0f}",
        _age(value["stepped"], now),
        _age(value["saved"], now),
        f"{seconds.get('seconds productive', 0.0) / wall:.0%}" if wall else "",
    ]


def _age(moment: float, now: float) -> str:
    return f"{now - moment:.0f} s ago" if moment else ""
