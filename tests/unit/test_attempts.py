"""The table of attempts: one row per group that trained, and why it ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tasks.attempts import TAG_CHARACTERS, attempt_tags, attempts_table, begun_by_token
from training.runs.events import Event
from training.runs.record import CheckpointRef, Departure, Failure, Record, Result

RESULT = Result(step=9, weights_sha256="", state_sha256="", checkpoint=CheckpointRef(step=9, token=1, sha256=""))
LOST = Departure(token=1, node=1, cause="killed by signal 9", step=4, class_name="Killed")
RECORD = Record(key="k", token=4, resume_steps=(0, None, 4, 6), departures=(LOST,))


def ends(record: Record) -> list[tuple[int, str]]:
    return [(row["token"], row["why_it_ended"]) for row in attempts_table(record, {})]


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, ""),
        ({"result": RESULT}, "finished"),
        ({"failure": Failure(kind="UserError", message="no such shape")}, "no such shape"),
    ],
)
def test_each_group_that_trained_has_a_row_that_says_why_it_ended(changes: dict[str, Any], last: str) -> None:
    expected = [(1, "node 1: killed by signal 9"), (3, "the nodes regrouped"), (4, last)]
    assert ends(replace(RECORD, **changes)) == expected


def test_run_that_nobody_began_has_no_row() -> None:
    assert attempts_table(Record(key="k"), {}) == []
    assert attempt_tags(Record(key="k")) == {"unbroken.attempts": "0", "unbroken.departures": "0"}


def test_row_says_what_the_groups_first_event_told() -> None:
    told = Event(kind="attempt", time=0.5, token=3, step=4, values={"world_size": 2, "source": "memory"})
    step = Event(kind="step", time=1.0, token=3, step=5)
    rows = attempts_table(RECORD, begun_by_token([told, step]))
    assert rows[1] == {
        "token": 3,
        "began": "1970-01-01T00:00:00.500+00:00",
        "ranks": 2,
        "from_step": 4,
        "from": "memory",
        "why_it_ended": "the nodes regrouped",
    }


def test_tags_tell_the_last_departure_and_the_failure_in_few_words() -> None:
    failed = replace(RECORD, failure=Failure(kind="UserError", message="x" * 10_000))
    assert attempt_tags(failed) == {
        "unbroken.attempts": "3",
        "unbroken.departures": "1",
        "unbroken.last_departure": "killed by signal 9",
        "unbroken.failure": "x" * TAG_CHARACTERS,
    }
