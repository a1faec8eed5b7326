"""What the reaper makes of what it sees, case by case."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows.publish import judged_of, wanted_of
from flows.reaper.decide import (
    CANCEL_SECONDS,
    CRASHED_SECONDS,
    END_SECONDS,
    GONE_SECONDS,
    MAX_CRASHES_IN_AN_HOUR,
    QUIET_SECONDS,
    SILENT_SECONDS,
    FlowSight,
    FlowVerdict,
    TrackedSight,
    TrackedVerdict,
    is_job_unwanted,
    judge_flow,
    judge_tracked,
)
from flows.reaper.engine_jobs import end_unwanted
from flows.reaper.flow_runs import newest_event
from flows.reaper.signs import MAX_GAP_SECONDS, Signs
from infra.launcher import CANCELLED, JobState
from tasks import tracking
from tasks.lifecycle import alias
from training.errors import InfrastructureError, UserError

LONG = 1e6


def flow(state: str, **seen: Any) -> FlowVerdict:
    calm = {"seconds_in_state": LONG, "is_here": False, "was_here": False, "silent_seconds": 0.0}
    return judge_flow(FlowSight(state=state, **{**calm, **seen}))


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_healthy_flow_run_is_left_alone(state: str) -> None:
    """By its process, however silent; or by its heartbeats, from wherever."""
    assert flow(state, is_here=True, was_here=True, silent_seconds=LONG) is FlowVerdict.LEAVE
    assert flow(state, silent_seconds=SILENT_SECONDS) is FlowVerdict.LEAVE
    assert flow(state, was_here=True, silent_seconds=GONE_SECONDS) is FlowVerdict.LEAVE, "its worker may tell of it"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_lost_flow_run_is_resumed(state: str) -> None:
    assert flow(state, was_here=True, silent_seconds=GONE_SECONDS + 1) is FlowVerdict.RESUME
    assert flow(state, silent_seconds=SILENT_SECONDS + 1) is FlowVerdict.RESUME


def test_crashed_flow_run_is_resumed_but_not_for_ever() -> None:
    assert flow("CRASHED", num_crashes=MAX_CRASHES_IN_AN_HOUR) is FlowVerdict.RESUME
    assert flow("CRASHED", num_crashes=MAX_CRASHES_IN_AN_HOUR + 1) is FlowVerdict.LEAVE


def test_crashed_flow_run_is_resumed_only_when_its_worker_has_nothing_more_to_report() -> None:
    assert flow("CRASHED", seconds_in_state=CRASHED_SECONDS) is FlowVerdict.LEAVE
    assert flow("CRASHED", seconds_in_state=CRASHED_SECONDS + 1) is FlowVerdict.RESUME


def test_flow_run_that_is_called_crashed_while_its_process_lives_is_not_executed_twice() -> None:
    assert flow("CRASHED", is_here=True, was_here=True) is FlowVerdict.RESTORE


@pytest.mark.parametrize("state", ["SCHEDULED", "PAUSED", "COMPLETED", "FAILED", "CANCELLED"])
def test_other_states_are_not_the_reapers(state: str) -> None:
    assert flow(state, silent_seconds=LONG, num_crashes=99) is FlowVerdict.LEAVE


def test_cancelling_is_left_to_its_process_and_then_not() -> None:
    here = {"is_here": True, "was_here": True}
    assert flow("CANCELLING", seconds_in_state=CANCEL_SECONDS, **here) is FlowVerdict.LEAVE
    assert flow("CANCELLING", seconds_in_state=CANCEL_SECONDS + 1, **here) is FlowVerdict.CANCEL_JOBS
    assert flow("CANCELLING", seconds_in_state=END_SECONDS + 1, **here) is FlowVerdict.END
    assert flow("CANCELLING", seconds_in_state=CANCEL_SECONDS + 1, was_here=True) is FlowVerdict.END
    assert flow("CANCELLING", seconds_in_state=CANCEL_SECONDS + 1) is FlowVerdict.CANCEL_JOBS, "it may be elsewhere"


@pytest.mark.parametrize(
    ("owners", "is_unwanted"),
    [
        (["CANCELLED"], True),
        (["CANCELLED", "COMPLETED"], True),
        (["CANCELLED", None], True),
        (["CANCELLED", "RUNNING"], False),
        (["CANCELLED", "SCHEDULED"], False),
        (["CANCELLING"], False),
        (["FAILED", "CRASHED"], False),
        ([None], False),
        ([], False),
    ],
)
def test_job_is_unwanted_when_who_wanted_it_was_cancelled(owners: list[str | None], is_unwanted: bool) -> None:
    assert is_job_unwanted(owners) is is_unwanted


class OneCancelled:
    """An engine with a job, of which whoever cancelled it died amid that."""

    def __init__(self) -> None:
        self.reaped: list[str] = []
        self.reap = self.reaped.append

    def jobs(self) -> dict[str, list[str]]:
        return {"half cancelled": ["somebody", CANCELLED], "at work": ["somebody"]}


def test_job_that_was_half_cancelled_is_ended_whoever_owns_it() -> None:
    launcher: Any = OneCancelled()
    nobody: Any = SimpleNamespace(states=lambda ids: {})
    end_unwanted(launcher, nobody)
    assert launcher.reaped == ["half cancelled"]


def tracked(**seen: Any) -> TrackedVerdict:
    return judge_tracked(TrackedSight(**{"quiet_seconds": LONG, **seen}))


def test_mlflow_run_of_which_something_lives_is_left_running() -> None:
    assert tracked(quiet_seconds=QUIET_SECONDS, has_result=True) is TrackedVerdict.LEAVE
    assert tracked(job=JobState.RUNNING) is TrackedVerdict.LEAVE, "the ranks train on without a follower"


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        ({"has_result": True}, TrackedVerdict.FINISHED),
        ({"has_result": True, "job": JobState.RUNNING}, TrackedVerdict.FINISHED),
        ({"has_failed": True, "job": JobState.RUNNING}, TrackedVerdict.FAILED),
        ({"job": JobState.ENDED}, TrackedVerdict.FAILED),
        ({}, TrackedVerdict.KILLED),
        ({"is_removed": True}, TrackedVerdict.KILLED),
        ({"is_older": True, "is_named": False, "job": JobState.RUNNING}, TrackedVerdict.KILLED),
        ({"is_named": False, "job": JobState.RUNNING}, TrackedVerdict.DELETE),
    ],
)
def test_mlflow_run_of_which_nothing_lives_gets_its_status(seen: dict[str, Any], verdict: TrackedVerdict) -> None:
    assert tracked(**seen) is verdict


def test_what_does_not_change_grows_old_and_a_change_makes_it_young() -> None:
    signs = Signs()
    ages = [signs.seconds_unchanged("a", value, now=now) for now, value in enumerate("xxxyy")]
    assert ages == [0, 1, 2, 0, 1]


def test_after_a_gap_between_two_looks_everything_is_young_again() -> None:
    signs = Signs()
    for now, age in ((1000.0, 0.0), (1000.0 + MAX_GAP_SECONDS, MAX_GAP_SECONDS), (1001.0 + 2 * MAX_GAP_SECONDS, 0.0)):
        signs.begin_look({"a"}, now=now)
        assert signs.seconds_unchanged("a", "x", now=now) == age
    signs.begin_look(set(), now=now)
    assert signs.seconds_unchanged("a", "x", now=now + 1) == 0, "it was forgotten"


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"events": 3}', b'{"events": [{}]}', b'{"events": {"a": 1}}'])
def test_an_answer_that_is_no_list_of_events_is_named(answer: bytes) -> None:
    with pytest.raises(InfrastructureError, match="Prefect does not answer as it should"):
        newest_event(answer)


def test_the_newest_event_is_the_first() -> None:
    assert newest_event(b'{"events": [{"id": "a"}, {"id": "b"}]}') == "a"
    assert newest_event(b'{"events": []}') is None


@pytest.mark.parametrize("generation", ["", "x", "-1", "9" * 5000, "1.0"])
def test_an_mlflow_run_whose_tags_tell_of_no_run_is_a_persons(generation: str) -> None:
    assert tracking.open_run("r", {tracking.RUN_KEY_TAG: "k", tracking.GENERATION_TAG: generation}) is None
    assert tracking.open_run("r", {tracking.GENERATION_TAG: "0"}) is None


def test_a_tag_that_is_no_change_of_champion_is_none() -> None:
    for text in ("", "x", "-1", "9" * 5000):
        assert alias.shown_change({alias.SHOWN_TAG: text}) == 0
    assert alias.shown_change({alias.SHOWN_TAG: "12"}) == 12


@pytest.mark.parametrize("label", ["", "3", "a b c", "3 x", "3 -1", f"3 {'9' * 5000}", "3 \u0664"])
def test_a_label_that_names_no_version_is_named(label: str) -> None:
    with pytest.raises(UserError, match="names no version: start another flow run"):
        judged_of(label)


@pytest.mark.parametrize("label", ["", "[]", "{}", "[" * 5000])
def test_a_label_that_names_no_data_is_named(label: str) -> None:
    with pytest.raises(UserError, match="names no data to be predicted"):
        wanted_of(label)
    assert judged_of("3 12") == ("3", 12)
