"""From the results of the recovery bench, which kills real processes by the clock, to parameters and a prediction.

The results are one JSON object:

    num_nodes, step_seconds, kill_every_seconds
    seconds_lost: {"median": …, "low": …, "high": …}    of one kill in all, with its interval
    parts: {"detection": …, "regroup": …, "transfer": …}    medians of one kill; optional
    goodput: …    of the whole disturbed run against the calm one; optional

With `parts`, the prediction owes nothing to `seconds_lost` but checks it. Without, all of the loss but half a step,
which a broken step costs on average, is taken for detection: then only `goodput` checks anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.recovery.model import DAY_SECONDS, Parameters, Policy, Replacement
from benchmarks.recovery.simulation import NANOSECONDS, periodic_failures, simulate

ALLOWED_ERROR = 0.1
NUM_KILLS = 1000  # simulated: the prediction is a mean


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the simulation makes of the bench's results."""

    parameters: Parameters
    predicted_goodput: float
    predicted_low: float
    """With the upper end of the seconds lost."""
    predicted_high: float
    predicted_lost_seconds: float
    """Of one kill, on average."""
    lost_error: float
    """Relative, against the measured median."""
    goodput_error: float | None
    """Relative, against the measured goodput if there is one."""
    checked: bool
    """Whether anything was measured that the parameters are not made from."""

    @property
    def within(self) -> bool:
        return self.checked and max(abs(self.lost_error), abs(self.goodput_error or 0.0)) <= ALLOWED_ERROR


def calibrate(path: Path) -> Calibration:
    """Parameters from the results in this file, and the goodput that they predict for the bench's own run."""
    found: dict[str, Any] = json.loads(path.read_text())
    lost = found["seconds_lost"]
    if not 0 <= lost["low"] <= lost["median"] <= lost["high"]:
        raise ValueError(f"{path}: seconds_lost must have 0 <= low <= median <= high")
    measured = lost["median"]
    p = _parameters(found)
    goodput, lost_seconds = _predict(p, found)
    low, high = (_predict(_shifted(p, lost[end] - measured), found)[0] for end in ("high", "low"))
    return Calibration(
        parameters=p,
        predicted_goodput=goodput,
        predicted_low=low,
        predicted_high=high,
        predicted_lost_seconds=lost_seconds,
        lost_error=lost_seconds / measured - 1 if measured else 0.0,
        goodput_error=goodput / found["goodput"] - 1 if found.get("goodput") else None,
        checked=bool(found.get("parts") or found.get("goodput")),
    )


def _parameters(found: dict[str, Any]) -> Parameters:
    """The bench's nodes are processes on one machine whose checkpoints are not disturbed: none are simulated."""
    step_seconds = found["step_seconds"]
    parts = found.get("parts") or {"detection": max(0.0, found["seconds_lost"]["median"] - step_seconds / 2)}
    return Parameters(
        num_nodes=found["num_nodes"],
        node_mtbf_seconds=found["num_nodes"] * found["kill_every_seconds"],
        step_seconds=step_seconds,
        detection_seconds=parts["detection"],
        regroup_seconds=parts.get("regroup", 0.0),
        state_bytes=parts.get("transfer", 0.0),
        bandwidth_bytes_per_second=1.0,
        checkpoint_every_seconds=DAY_SECONDS,
        checkpoint_stall_seconds=0.0,
        checkpoint_load_seconds=0.0,
        replacement_seconds=0.0,
        policy=Policy.SURVIVORS,
        replacement=Replacement.SPARE,
        num_copies=found["num_nodes"],
    )


def _shifted(p: Parameters, seconds: float) -> Parameters:
    return replace(p, detection_seconds=max(0.0, p.detection_seconds + seconds))


def _predict(p: Parameters, found: dict[str, Any]) -> tuple[float, float]:
    """Goodput, and seconds lost by a kill."""
    every = found["kill_every_seconds"]
    kills = periodic_failures(p, every_seconds=every, num_failures=NUM_KILLS, jitter_seconds=p.step_seconds)
    done = simulate(p, horizon_seconds=NUM_KILLS * every, failures=kills)
    return done.goodput, (done.wall - done.productive) / NANOSECONDS / max(1, done.num_failures)
