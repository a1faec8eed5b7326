"""Every second of a run is booked once, whatever happened in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.runs.events import Event
from training.runs.goodput import USES, Account, Goodput, account


def step(number: int, *, token: int = 1, end: float, seconds: float = 1.0, **values: Any) -> Event:
    return Event(
        kind="step", time=end, token=token, step=number, values={"seconds": seconds, "validation": {}, **values}
    )


def attempt(token: int, *, at: float, source: str, step: int = 0) -> Event:
    return Event(kind="attempt", time=at, token=token, step=step, values={"source": source})


def test_a_calm_run() -> None:
    events = [
        attempt(1, at=10.0, source="start"),
        step(1, end=12.0),
        step(2, end=13.5, validation={"loss": 1.0}),
        step(3, end=16.5),
        Event(kind="finished", time=17.0, token=1, step=3),
    ]
    found = account(events, [0])
    assert found.seconds == {
        "productive": 3.0,
        "redone": 0.0,
        "recovery": 0.0,
        "waiting": 1.0,
        "checkpoint": 1.0,
        "validation": 2.0,
    }
    assert found.share == pytest.approx(3 / 7)


def test_a_group_that_goes_on_from_memory_recovers_and_tells_again() -> None:
    events = [
        attempt(1, at=0.0, source="start"),
        step(1, end=1.0),
        step(2, end=2.0),
        *(step(number, token=2, end=float(number)) for number in (1, 2)),
        attempt(2, at=4.0, source="memory", step=2),
        step(3, token=2, end=6.0),
    ]
    found = account(events, [0, 0])
    assert (found.seconds["productive"], found.seconds["recovery"]) == (3.0, 3.0)
    assert found.wall_seconds == 6.0


def test_steps_that_are_done_again_count_once() -> None:
    events = [
        attempt(1, at=0.0, source="start"),
        *(step(number, end=float(number)) for number in (1, 2, 3)),
        attempt(2, at=10.0, source="checkpoint", step=1),
        *(step(number, token=2, end=9.0 + number) for number in (2, 3)),
    ]
    found = account(events, [0, 1])
    assert found.seconds == {
        "productive": 3.0,
        "redone": 2.0,
        "recovery": 0.0,
        "waiting": 7.0,
        "checkpoint": 0.0,
        "validation": 0.0,
    }


def test_steps_of_runs_that_did_not_tell_how_long_they_took_count_as_what_lies_between() -> None:
    old = [Event(kind="step", time=float(number), token=1, step=number, values={}) for number in (1, 2)]
    assert account([attempt(1, at=0.0, source="start"), *old], [0]).wall_seconds == 2.0


def test_no_events_took_no_time() -> None:
    assert account([], []).share == 0.0


def settled_on_the_way(events: Sequence[Event], resumed: Sequence[int]) -> Goodput:
    """By an account that after each group's events forgets what no later group does again."""
    followed = Account()
    for token in range(1, len(resumed) + 1):
        followed.add(event for event in events if event.token == token)
        followed.settle(min(resumed[token:], default=10**9), resumed[:token])
        assert followed.goodput(resumed[:token]).wall_seconds >= 0.0, "asked on the way, it changes nothing"
    return followed.goodput(resumed)


def test_what_is_settled_is_not_kept() -> None:
    followed = Account()
    for number in range(1, 1001):
        followed.add([step(number, end=float(number))])
        followed.settle(number - 2, [0])
    assert len(followed._open) == 2
    followed.add([step(3, token=2, end=3.0)])  # told again
    assert followed.goodput([0, 1000]).seconds["productive"] == 999.0


@given(st.data())
def test_all_uses_add_up_to_the_wall_time(data: st.DataObject) -> None:
    now, number, events, resumed = 100.0, 0, [], []
    for token in range(1, data.draw(st.integers(1, 4)) + 1):
        number = data.draw(st.integers(0, number))
        resumed.append(number)
        now += data.draw(st.floats(0.001, 5.0))
        source = data.draw(st.sampled_from(["start", "memory", "checkpoint"]))
        events.append(attempt(token, at=now, source=source, step=number))
        for _ in range(data.draw(st.integers(0, 4))):
            number += 1
            seconds = data.draw(st.floats(0.001, 3.0))
            now += seconds * data.draw(st.floats(0.9, 2.0))  # clocks are set while a step is timed
            events.append(step(number, token=token, end=now, seconds=seconds))
    found = account(events, resumed)
    assert settled_on_the_way(events, resumed).seconds == pytest.approx(found.seconds, abs=1e-6)
    assert found.wall_seconds == pytest.approx(now - events[0].time, abs=1e-6)
    assert set(found.seconds) == set(USES)
    assert min(found.seconds.values()) >= 0
