"""Many schedules on several processes, and what they gave in a few lines."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

from tests.simulation.faults import STATES, STRIKES
from tests.simulation.runner import Summary, run_many

CHUNK = 500


def run_side_by_side(seeds: range, num_processes: int) -> Summary:
    total = Summary()
    chunks = [seeds[begin : begin + CHUNK] for begin in range(0, len(seeds), CHUNK)]
    with ProcessPoolExecutor(num_processes) as pool:
        for part in pool.map(run_many, chunks):
            total.merge(part)
    return total


def missing(summary: Summary) -> list[tuple[tuple[str, str], str]]:
    """Pairs of a node's state and a fault that no schedule hit."""
    return [(state, name) for state in STATES for name in STRIKES if (state, name) not in summary.struck]


def rows_of(summary: Summary, *, seconds: float) -> list[dict[str, Any]]:
    """For an evidence file."""
    return [
        {
            "schedules": summary.num_schedules,
            "distinct": len(summary.fingerprints),
            "broken": summary.broken[:100],
            "median_events": median(summary.num_events),
            "commits_fenced_off": summary.num_fenced,
            "outcomes": summary.outcomes,
            "seconds": round(seconds),
        },
        {
            "pairs_of_state_and_fault": len(STATES) * len(STRIKES),
            "hit": len(summary.struck),
            "never_hit": [[*state, name] for state, name in missing(summary)],
            "hits": {f"{phase}, {role}: {name}": n for ((phase, role), name), n in sorted(summary.struck.items())},
        },
    ]


def tell(summary: Summary, *, seconds: float) -> str:
    pairs = len(STATES) * len(STRIKES)
    lines = [
        f"{summary.num_schedules} schedules, {len(summary.fingerprints)} distinct, in {seconds:.0f} s"
        f" ({summary.num_schedules / seconds:.0f}/s); median {median(summary.num_events):.0f} events",
        f"outcomes {summary.outcomes}; {summary.num_fenced} commits fenced off;"
        f" {pairs - len(missing(summary))} of {pairs} pairs of state and fault hit",
    ]
    lines += [f"not hit: {pair}" for pair in missing(summary)[:40]]
    rules: dict[str, list[int]] = {}
    for seed, message in summary.broken:
        rules.setdefault(message.split(":")[0], []).append(seed)
    lines += [f"BROKEN {len(seeds)} times: {rule}: seeds {seeds[:8]}" for rule, seeds in rules.items()]
    return "\n".join(lines)
