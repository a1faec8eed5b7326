"""What the steps of a run say of a fault in it: how long none was finished, and how many had to be done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Step:
    """One that a group finished. Times are of the wall clock, in seconds."""

    time: float
    number: int
    num_ranks: int
    group: str
    """Of one start of the ranks: changes whenever they regroup."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """From a fault to the first step that another group finished."""

    seconds: float
    lost_seconds: float
    """From the last step before to that first step, less one step: what the run does without."""
    num_redone: int


def recovery(steps: Sequence[Step], *, fault_time: float) -> Recovery | None:
    """None as long as no other group than that of the fault has finished a step."""
    before = [step for step in steps if step.time <= fault_time]
    if not before:
        raise ValueError("no step was finished before the fault")
    struck = before[-1].group
    after = [step for step in steps if step.time > fault_time and step.group != struck]
    if not after:
        return None
    first = after[0]
    done = [step for step in steps if step.group == struck and step.time < first.time]
    gap = first.time - done[-1].time
    return Recovery(
        seconds=first.time - fault_time,
        lost_seconds=gap - step_seconds([step for step in before if step.group == struck]),
        num_redone=max(step.number for step in done) + 1 - first.number,
    )


def longest_pause(steps: Sequence[Step], *, since: float, until: float) -> float:
    """Between two steps finished one after another, of which the second came in that time."""
    pairs = pairwise(steps)
    return max((later.time - earlier.time for earlier, later in pairs if since < later.time <= until), default=0.0)


def step_seconds(steps: Sequence[Step]) -> float:
    """The median between two steps of one group; 0 if there are no two."""
    pairs = pairwise(steps)
    gaps = sorted(later.time - earlier.time for earlier, later in pairs if earlier.group == later.group)
    return gaps[len(gaps) // 2] if gaps else 0.0
