"""`python -m benchmarks.recovery.goodput`: what failures leave of a run, by recovery policy and number of nodes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.recovery.calibration import Calibration, calibrate
from benchmarks.recovery.figure import draw
from benchmarks.recovery.scenarios import (
    ASSUMED,
    LLAMA3,
    LLAMA3_DAYS,
    LLAMA3_NODES,
    NODE_COUNTS,
    SCENARIOS,
    SLOWER,
    SURVIVORS,
    Point,
    at,
    llama3_allowed_loss_seconds,
    llama3_goodput,
    sensitivity,
    sweep,
)

SHOWN = (LLAMA3_NODES, 16_384, 131_072)

Changes = Sequence[tuple[str, float, float]]


def measure() -> dict[str, Any]:
    """Everything, as it goes into the JSON; points stay objects until then."""
    largest = at(SURVIVORS, NODE_COUNTS[-1])
    return {
        "llama3_goodput": llama3_goodput(),
        "llama3_allowed_loss_seconds": llama3_allowed_loss_seconds(),
        "llama3_sensitivity": [*sensitivity(LLAMA3, ASSUMED, days=LLAMA3_DAYS)],
        "survivors_sensitivity": [*sensitivity(largest, SLOWER, days=1)],
        "points": [point for scenario in SCENARIOS for point in sweep(scenario)],
    }


def as_markdown(found: Mapping[str, Any]) -> str:
    return "\n".join(
        (
            f"Llama 3, simulated: {found['llama3_goodput']:.1%}; an interruption may cost "
            f"{found['llama3_allowed_loss_seconds']:.0f} s in all.",
            "",
            *_scale(found["points"]),
            "",
            *_varied(found["llama3_sensitivity"], f"goodput of Llama 3's run, {LLAMA3_NODES:,} nodes"),
            "",
            *_varied(found["survivors_sensitivity"], f"survivors, hot spares, {NODE_COUNTS[-1]:,} nodes"),
        )
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _scale(points: Sequence[Point]) -> Iterator[str]:
    yield _row(["goodput, simulated (closed form); checkpoint every", *(f"{count:,} nodes" for count in SHOWN)])
    yield _row(["---"] * (1 + len(SHOWN)))
    for scenario in SCENARIOS:
        chosen = [point for point in points if point.scenario == scenario and point.num_nodes in SHOWN]
        yield _row([scenario, *map(_cell, chosen)])


def _cell(point: Point) -> str:
    return f"{point.simulated:.1%} ({point.estimated:.1%}); {point.checkpoint_every_seconds:.0f} s"


def _varied(changes: Changes, title: str) -> Iterator[str]:
    """One row a parameter: its values, with the goodput below each."""
    names = list(dict.fromkeys(name for name, _, _ in changes))
    yield _row([title, *[""] * 5])
    yield _row(["---"] * 6)
    for name in names:
        yield _row([f"`{name}`", *(f"{value:.4g}: {found:.1%}" for other, value, found in changes if other == name)])


def _calibrated(found: Calibration) -> str:
    error = "not measured" if found.goodput_error is None else f"{found.goodput_error:+.1%}"
    return (
        f"Predicted goodput {found.predicted_goodput:.1%} ({found.predicted_low:.1%}–{found.predicted_high:.1%}), "
        f"error {error}; lost by a kill {found.predicted_lost_seconds:.3f} s, error {found.lost_error:+.1%}; "
        f"{'within' if found.within else 'NOT within'} 10 %."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="everything as JSON instead of tables")
    parser.add_argument("--figure", type=Path, help="write the figure here (SVG)")
    parser.add_argument(
        "--calibrate", type=Path, help="results of the recovery bench: predict its goodput, and no more"
    )
    chosen = parser.parse_args(arguments)
    if chosen.calibrate:
        found = calibrate(chosen.calibrate)
        print(json.dumps(asdict(found), indent=1, default=lambda it: it.value) if chosen.json else _calibrated(found))
        return
    results = measure()
    if chosen.figure:
        draw(results["points"], chosen.figure)
    print(json.dumps(results, indent=1, default=asdict) if chosen.json else as_markdown(results))


if __name__ == "__main__":
    main()
