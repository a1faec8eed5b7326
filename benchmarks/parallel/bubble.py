"""How long the stages of a pipeline wait, beside the formula: measured on two ranks, and of four simulated.

Two cores cannot show four stages at work at once. So four real ranks compute each pass, in turns as it happens, and
note its processor time; then the schedule is played on a clock with these, and with the time of a message.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks.parallel.clock import all_actions, play
from benchmarks.parallel.ranks import answers_of
from training.layout import Schedule
from training.parallel.schedule import bubble

SIZES = ((2, 4), (2, 8), (4, 8))
"""Stages, and microbatches."""
NUM_CORES = 2
Told = Mapping[str, Any]
"""Of one stage."""


@dataclass(frozen=True, kw_only=True)
class Case:
    schedule: Schedule
    num_stages: int
    num_microbatches: int

    @property
    def formula(self) -> float:
        return float(bubble(self.schedule, num_stages=self.num_stages, num_microbatches=self.num_microbatches))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel bubble", description=__doc__)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--width", type=int, default=384)
    asked = parser.parse_args(arguments)
    print("| schedule | stages | microbatches | formula | simulated | / formula | measured (min–max) | / formula |")
    print("| --- " * 8 + "|")
    for num_stages, num_microbatches in SIZES:
        for schedule in get_args(Schedule):
            case = Case(schedule=schedule, num_stages=num_stages, num_microbatches=num_microbatches)
            told = answers_of("bubble_rank", schedule, num_microbatches, asked.steps, asked.width, num_ranks=num_stages)
            print(_row(case, told), flush=True)


def _row(case: Case, told: Sequence[Told]) -> str:
    simulated, measured = _simulated(case, told), _measured(told)
    cells = ["", ""]
    if case.num_stages <= NUM_CORES:
        middle = statistics.median(measured)
        cells = [f"{middle:.3f} ({min(measured):.3f}–{max(measured):.3f})", f"{middle / case.formula:.2f}"]
    cells = [f"{case.formula:.3f}", f"{simulated:.3f}", f"{simulated / case.formula:.2f}", *cells]
    return f"| {case.schedule} | {case.num_stages} | {case.num_microbatches} | " + " | ".join(cells) + " |"


def _measured(told: Sequence[Told]) -> list[float]:
    """Of each step, the share of the time in which a stage does nothing."""
    found = []
    for stages in zip(*(one["steps"] for one in told), strict=True):
        busy = sum(stage["seconds"] - stage["waited"] for stage in stages)
        found.append(1 - busy / len(stages) / max(stage["seconds"] for stage in stages))
    return found


def _simulated(case: Case, told: Sequence[Told]) -> float:
    """Likewise, if each stage has a core of its own, and each pass through a chunk takes the median of all."""
    taken: dict[tuple[bool, int], list[float]] = {}
    for stage in told:
        for step in stage["steps"]:
            for is_forward, chunk, _, seconds in step["passes"]:
                taken.setdefault((is_forward, chunk), []).append(seconds)
    seconds_of = {way: statistics.median(seconds) for way, seconds in taken.items()}
    message_seconds: float = told[1]["message_seconds"]
    _tell(seconds_of, message_seconds)
    stages = all_actions(case.schedule, case.num_stages, case.num_microbatches)
    end = play(stages, lambda one: seconds_of[one.is_forward, one.chunk], message_seconds)
    return 1 - sum(seconds_of.values()) * case.num_microbatches / case.num_stages / end


def _tell(seconds_of: Mapping[tuple[bool, int], float], message_seconds: float) -> None:
    """What it is calibrated with, in milliseconds."""
    for is_forward in (True, False):
        found = [seconds for (way, _), seconds in sorted(seconds_of.items()) if way == is_forward]
        told = " ".join(f"{seconds * 1000:.1f}" for seconds in found)
        print(f"{'forward' if is_forward else 'back'}, by chunk: {told} ms", file=sys.stderr)
    print(f"a message: {message_seconds * 1000:.1f} ms", file=sys.stderr)
