"""Pipeline schedules, played on a clock: each stage does its actions in order, and waits for what it receives."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest

from benchmarks.parallel.clock import all_actions, play
from training.errors import UserError
from training.parallel.schedule import (
    Action,
    Pass,
    Schedule,
    actions,
    bubble,
    chunks_per_rank,
    num_in_flight,
    passes,
)

SIZES = list(product((2, 3, 4, 8), (1, 2, 4, 6, 8, 24)))
"""Stages, and microbatches."""
CASES: list[tuple[Schedule, int, int]] = [
    *(("gpipe", p, m) for p, m in SIZES),
    *(("1f1b", p, m) for p, m in SIZES),
    *(("interleaved", p, m) for p, m in SIZES if m % p == 0),
]


def seconds_of(one: Pass, schedule: Schedule) -> Fraction:
    """Back takes twice as long as forward, and each chunk its part of that."""
    return Fraction(1 if one.is_forward else 2, chunks_per_rank(schedule))


@pytest.mark.parametrize(("schedule", "num_stages", "num_microbatches"), CASES)
def test_a_schedule_is_whole_and_ends_after_its_time(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    stages = all_actions(schedule, num_stages, num_microbatches)
    computed = [action.of for own in stages for action in own if action.verb == "compute"]
    num_chunks = num_stages * chunks_per_rank(schedule)
    assert sorted(computed, key=repr) == sorted(
        (Pass(way, c, m) for way, c, m in product((True, False), range(num_chunks), range(num_microbatches))), key=repr
    )
    sent = [action.of for own in stages for action in own if action.verb == "send"]
    received = [action.of for own in stages for action in own if action.verb == "receive"]
    assert sorted(sent, key=repr) == sorted(received, key=repr)
    assert len(sent) == 2 * (num_chunks - 1) * num_microbatches
    for number, own in enumerate(stages):
        assert all(action.of.chunk % num_stages == number for action in own if action.verb != "receive")
        assert all(action.of.chunk % num_stages != number for action in own if action.verb == "receive")
    share = 1 - 3 * num_microbatches / play(stages, lambda one: seconds_of(one, schedule), Fraction(0))
    assert share == bubble(schedule, num_stages=num_stages, num_microbatches=num_microbatches)


@pytest.mark.parametrize(("schedule", "num_stages", "num_microbatches"), CASES)
def test_each_chunk_goes_through_its_microbatches_in_their_order(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    """Both ways: backwards it is the order in which gradients are summed, forwards that in which samples are read."""
    for stage in range(num_stages):
        found = passes(schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches)
        for key in {(one.is_forward, one.chunk) for one in found}:
            order = [one.microbatch for one in found if (one.is_forward, one.chunk) == key]
            assert order == list(range(num_microbatches))


@pytest.mark.parametrize(("schedule", "num_stages", "num_microbatches"), CASES)
def test_what_a_stage_keeps_is_what_plan_reckons_with(
    schedule: Schedule, num_stages: int, num_microbatches: int
) -> None:
    for stage in range(num_stages):
        about = {"stage": stage, "num_stages": num_stages, "num_microbatches": num_microbatches}
        alive = most = 0
        for one in passes(schedule, **about):
            alive += 1 if one.is_forward else -1
            most = max(most, alive)
        assert alive == 0
        assert most == num_in_flight(schedule, **about) * chunks_per_rank(schedule)


def test_one_stage_in_the_middle() -> None:
    f, b = (lambda m: Pass(True, 1, m)), (lambda m: Pass(False, 1, m))
    middle = {"stage": 1, "num_stages": 3, "num_microbatches": 3}
    assert passes("gpipe", **middle) == [f(0), f(1), f(2), b(0), b(1), b(2)]
    assert passes("1f1b", **middle) == [f(0), f(1), b(0), f(2), b(1), b(2)]
    assert actions("1f1b", **middle)[:3] == [
        Action("receive", Pass(True, 0, 0)),
        Action("compute", Pass(True, 1, 0)),
        Action("send", Pass(True, 1, 0)),
    ]
    chunks = [
        (one.is_forward, one.chunk, one.microbatch)
        for one in passes("interleaved", stage=1, num_stages=2, num_microbatches=4)
    ]
    assert chunks[:6] == [
        (True, 1, 0),
        (True, 1, 1),
        (True, 3, 0),
        (False, 3, 0),
        (True, 3, 1),
        (False, 3, 1),
    ]


def test_an_interleaved_schedule_takes_whole_rounds() -> None:
    with pytest.raises(
        UserError, match=r"of 4 stages takes a multiple of 4 microbatches, and here are 6: change train\."
    ):
        passes("interleaved", stage=0, num_stages=4, num_microbatches=6)
