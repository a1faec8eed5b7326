"""What a drill reads from the events of a run."""

from __future__ import annotations

import pytest

from tasks.drill import measure
from training.runs.events import Event

NAN = float("nan")


def step(number: int, time: float, *, token: int = 1, samples: str = "") -> Event:
    values = {"loss": 1.0 / number, "grad_norm": 2.0, "samples": samples or f"line {number}"}
    return Event(kind="step", time=time, token=token, step=number, values=values)


def attempt(token: int, time: float, *, at_step: int, source: str = "memory") -> Event:
    return Event(kind="attempt", time=time, token=token, step=at_step, values={"source": source, "world_size": 2})


SURVIVED = [
    attempt(1, 0.0, at_step=0, source="start"),
    *(step(number, float(number)) for number in (1, 2, 3)),
    *(step(number, float(number), token=2) for number in (2, 3)),  # told again by who went on
    attempt(2, 4.4, at_step=3),
    *(step(number, number + 1.5, token=2) for number in (4, 5)),
]
"""A fault at 3.2, and none of the steps done again."""
LOST = [
    attempt(1, 0.0, at_step=0, source="start"),
    *(step(number, float(number)) for number in (1, 2, 3)),
    attempt(3, 9.0, at_step=2, source="checkpoint"),
    *(step(number, number + 7.0, token=3) for number in (3, 4)),
]
"""All was lost at 3.2, and a group of token 2 never began."""


def test_the_next_step_is_one_of_a_later_groups_own() -> None:
    assert measure.next_step_time(SURVIVED, after=3.2, struck=1) == 5.5
    assert measure.next_step_time(LOST, after=3.2, struck=1) == 10.0
    assert measure.next_step_time(SURVIVED, after=3.2, struck=2) is None


def test_the_next_step_of_a_group_that_lives() -> None:
    assert measure.next_step_of_any(SURVIVED, after=1.5) == 2.0
    assert measure.next_step_of_any(SURVIVED, after=7.0) is None


def test_a_pause_counts_once_although_steps_are_told_again() -> None:
    assert measure.longest_pause(SURVIVED, since=3.2) == 2.5
    assert measure.longest_pause(SURVIVED, since=6.0) == 1.0
    assert measure.longest_pause([], since=0.0) == 0.0


def test_steps_done_again() -> None:
    assert measure.num_redone(SURVIVED) == 0
    assert measure.num_redone(LOST) == 1
    assert measure.is_from_memory(SURVIVED, since=1)
    assert not measure.is_from_memory(LOST, since=1)
    assert measure.is_from_memory(LOST, since=3)


def test_seconds_of_a_step() -> None:
    assert measure.median_step_seconds(LOST) == pytest.approx(1.0), "the pause lies between two groups"
    assert measure.median_step_seconds([]) == 0.0


def test_histories_are_the_same_or_differ_from_a_step_on() -> None:
    points = measure.history([step(1, 1.0), step(2, 2.0)])
    later = measure.history([step(1, 7.0, token=3), step(2, 8.0, token=3)])
    assert measure.first_difference(later, points) is None, "when, and by whom, does not count"
    assert measure.first_difference(measure.history([step(1, 1.0), step(2, 2.0, samples="other")]), points) == 2
    assert measure.first_difference(points[:1], points) == 2
    assert measure.first_difference(points, points[:1]) == 2
    assert measure.first_difference([(1, NAN, NAN, "a")], [(1, NAN, NAN, "a")]) is None


def test_samples_read_twice() -> None:
    assert measure.num_duplicated(measure.history([step(1, 1.0), step(2, 2.0)]), batch_size=8) == 0
    twice = measure.history([step(1, 1.0), step(2, 2.0, samples="line 1"), step(3, 3.0, samples="line 1")])
    assert measure.num_duplicated(twice, batch_size=8) == 16
