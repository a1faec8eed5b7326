"""What the recovery bench reads from the steps of a run."""

from __future__ import annotations

import pytest

from benchmarks.recovery.kills import _summary
from benchmarks.recovery.timeline import Step, longest_pause, recovery, step_seconds


def steps_of(group: str, *times: float, first: int, num_ranks: int = 3) -> list[Step]:
    return [Step(time=time, number=first + place, num_ranks=num_ranks, group=group) for place, time in enumerate(times)]


BEFORE = steps_of("a", 1.0, 1.1, 1.2, 1.3, first=1)


def test_a_fault_is_over_when_another_group_finishes_a_step() -> None:
    steps = BEFORE + steps_of("b", 1.9, 2.0, first=5)
    found = recovery(steps, fault_time=1.35)
    assert found is not None
    assert found.seconds == pytest.approx(0.55)
    assert found.lost_seconds == pytest.approx(0.5), "a step would have taken 0.1 anyway"
    assert found.num_redone == 0


def test_a_step_that_was_on_its_way_does_not_count_as_recovery() -> None:
    steps = BEFORE + steps_of("b", 1.9, first=5)
    found = recovery(steps, fault_time=1.25)
    assert found is not None
    assert found.seconds == pytest.approx(0.65)
    assert found.lost_seconds == pytest.approx(0.5)


def test_steps_that_are_done_again_are_counted() -> None:
    found = recovery(BEFORE + steps_of("b", 9.0, first=2), fault_time=1.35)
    assert found is not None
    assert found.num_redone == 3


def test_nobody_may_go_on() -> None:
    assert recovery(BEFORE, fault_time=1.35) is None
    with pytest.raises(ValueError, match="no step"):
        recovery(BEFORE, fault_time=0.5)


def test_the_longest_pause_may_begin_before() -> None:
    steps = BEFORE + steps_of("b", 1.7, 1.8, first=5)
    assert longest_pause(steps, since=1.5, until=2.0) == pytest.approx(0.4)
    assert longest_pause(steps, since=1.75, until=2.0) == pytest.approx(0.1)
    assert step_seconds(steps) == pytest.approx(0.1), "what lies between two groups is no step"


def test_the_interval_of_a_median_lies_among_what_was_seen() -> None:
    found = _summary([0.1 * number for number in range(1, 31)])
    assert found.median == pytest.approx(1.55)
    assert found.low == pytest.approx(1.0)
    assert found.high == pytest.approx(2.1)
    assert _summary([1.0]).low == 1.0
