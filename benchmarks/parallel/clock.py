"""A pipeline's schedule, played on a clock: each stage does its actions in order, and waits for what it receives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeVar

from training.layout import Schedule
from training.parallel.schedule import Action, Pass, actions

T = TypeVar("T", float, Fraction)


def all_actions(schedule: Schedule, num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """Of each stage."""
    return [
        actions(schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches)
        for stage in range(num_stages)
    ]


def play(stages: Sequence[Sequence[Action]], seconds_of: Callable[[Pass], T], message_seconds: T) -> T:
    """When the last one is done. A message takes its time once it was sent and is waited for. Fails if all that are not
    done wait for one another."""
    times = [message_seconds * 0 for _ in stages]
    sent: dict[Pass, T] = {}
    places = [0] * len(stages)
    is_going = True
    while is_going:
        is_going = False
        for number, own in enumerate(stages):
            while places[number] < len(own):
                action = own[places[number]]
                if action.verb == "receive" and action.of not in sent:
                    break
                if action.verb == "receive":
                    times[number] = max(times[number], sent[action.of]) + message_seconds
                elif action.verb == "compute":
                    times[number] += seconds_of(action.of)
                else:
                    sent[action.of] = times[number]
                places[number] += 1
                is_going = True
    assert places == [len(own) for own in stages], "they wait for one another"
    return max(times)
