"""Outcomes as ratios to the floor of the same round, in Markdown and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from benchmarks.data.contestants.protocol import Outcome
from benchmarks.data.fleet import CONTESTANTS, FLOOR
from benchmarks.data.measure import Bench, Case

TITLES = {contestant.name: contestant.title for contestant in CONTESTANTS}


def as_json(bench: Bench, about: dict[str, Any]) -> dict[str, Any]:
    return {
        **about,
        "cases": [
            {"case": case.title, "contestant": name, **_summary(bench, case, name), "rounds": [*map(asdict, outcomes)]}
            for case, name, outcomes in bench.results()
        ],
        "disqualified": [[case.title, name, why] for (case, name), why in bench.disqualified.items()],
        "damage": [[kind, name, what] for (kind, name), what in bench.damage.items()],
    }


def _summary(bench: Bench, case: Case, name: str) -> dict[str, Any]:
    own, floor = bench.outcomes[case, name], bench.outcomes[case, FLOOR.name]
    ratios = [mine.seconds / least.seconds for mine, least in zip(own, floor, strict=False)]
    return {
        "ratio": _spread(ratios),
        "seconds": _spread([outcome.seconds for outcome in own]),
        "cpu_seconds": _spread([outcome.cpu_seconds for outcome in own]),
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def as_markdown(bench: Bench) -> str:
    return "\n".join((*_ratios(bench), "", *_speeds(bench), "", *_damage(bench), *_disqualified(bench))) + "\n"


def _names(bench: Bench) -> list[str]:
    return [name for name in TITLES if name in bench.runners]


def _cases(bench: Bench) -> list[Case]:
    return list(dict.fromkeys(case for case, _ in (*bench.outcomes, *bench.disqualified)))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(bench: Bench, corner: str, cell: Callable[[Case, str], str], *, floor: bool) -> Iterator[str]:
    names = [name for name in _names(bench) if floor or name != FLOOR.name]
    yield _row([corner, *(TITLES[name] for name in names)])
    yield _row(["---"] * (1 + len(names)))
    for case in _cases(bench):
        yield _row([case.title, *(cell(case, name) for name in names)])


def _ratios(bench: Bench) -> Iterator[str]:
    def cell(case: Case, name: str) -> str:
        if not bench.outcomes.get((case, name)):
            return "disqualified" if (case, name) in bench.disqualified else "—"
        ratio = _summary(bench, case, name)["ratio"]
        return f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"

    yield from _table(bench, "time / floor, median (min–max)", cell, floor=False)


def _speeds(bench: Bench) -> Iterator[str]:
    def cell(case: Case, name: str) -> str:
        outcomes: list[Outcome] = bench.outcomes.get((case, name), [])
        if not outcomes:
            return "—"
        megabytes = bench.data[case.kind].num_bytes / 1e6
        speed = megabytes / statistics.median(outcome.seconds for outcome in outcomes)
        cpu = statistics.median(outcome.cpu_seconds for outcome in outcomes) / megabytes * 1000
        return f"{speed:.0f} MB/s, {cpu:.1f} s/GB"

    yield from _table(bench, "speed, and the client's CPU seconds per GB", cell, floor=True)


def _damage(bench: Bench) -> Iterator[str]:
    yield _row(["detects damage (one flipped byte in a stored shard)", *(f"{kind}" for kind in bench.data)])
    yield _row(["---"] * (1 + len(bench.data)))
    for name in _names(bench):
        if name != FLOOR.name:
            yield _row([TITLES[name], *(bench.damage.get((kind, name), "—") for kind in bench.data)])


def _disqualified(bench: Bench) -> Iterator[str]:
    if bench.disqualified:
        yield ""
    for (case, name), why in bench.disqualified.items():
        yield f"Disqualified: {TITLES[name]}, {case.title}: {why}"
