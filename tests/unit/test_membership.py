"""Who trains together: each change of the record's group, and when a run is given up. All are pure functions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.cluster.membership import (
    Proposal,
    begin_group,
    failure_to_report,
    is_over,
    launched_elsewhere,
    renew,
    with_secret,
)
from training.runs.record import CheckpointRef, Departure, Failure, Member, Record, Result

EMPTY = Record(key="k")
RESULT = Result(
    step=9, weights_sha256="w", state_sha256="s", checkpoint=CheckpointRef(step=9, token=1, sha256="manifest")
)


def member(node: int, incarnation: str = "a") -> Member:
    return Member(node=node, incarnation=incarnation, address="127.0.0.1", port=1000 + node)


def departure(token: int, *, node: int = 0, cause: str = "boom", step: int = 5, kind: str = "Exception") -> Departure:
    return Departure(token=token, node=node, cause=cause, step=step, class_name=kind)


def proposal(
    *nodes: int, after: int = 0, departures: tuple[Departure, ...] = (), generation: int = 0, max_restarts: int = 20
) -> Proposal:
    return Proposal(
        expected_token=after,
        generation=generation,
        members=tuple(member(node) for node in nodes),
        departures=departures,
        max_restarts=max_restarts,
    )


def test_a_group_has_the_next_token() -> None:
    first = begin_group(EMPTY, proposal(0, 1))
    assert (first.token, first.members, first.num_nodes) == (1, (member(0), member(1)), 2)
    second = begin_group(replace(first, signs_of_life=7), proposal(1, after=1))
    assert (second.token, second.members, second.num_nodes, second.signs_of_life) == (2, (member(1),), 1, 0)


def test_of_two_proposals_the_first_counts() -> None:
    """Also of equal ones: a request that is applied twice gives one group."""
    first = begin_group(EMPTY, proposal(0, 1))
    assert begin_group(first, proposal(2, 3)) == first
    assert begin_group(first, proposal(0, 1)) == first


@pytest.mark.parametrize(
    "over",
    [
        replace(EMPTY, result=RESULT),
        replace(EMPTY, failure=Failure(kind="UserError", message="m")),
        replace(EMPTY, generation=1),
    ],
    ids=["finished", "failed", "begun anew"],
)
def test_a_run_that_is_over_has_no_next_group(over: Record) -> None:
    assert is_over(over, 0)
    assert begin_group(over, proposal(0, 1, departures=(departure(0),))) == over


def test_why_the_last_group_is_no_more_is_noted_once() -> None:
    first = begin_group(EMPTY, proposal(0, 1))
    lost = departure(1, node=1, kind="NodeLost")
    second = begin_group(first, proposal(0, after=1, departures=(lost,)))
    third = begin_group(second, proposal(0, 1, after=2, departures=(lost, departure(2, kind="Killed"))))
    assert third.departures == (lost, departure(2, kind="Killed"))


def test_an_error_for_good_is_noted_instead_of_a_group() -> None:
    first = begin_group(EMPTY, proposal(0, 1))
    after = begin_group(first, proposal(0, 1, after=1, departures=(departure(1, kind="UserError", cause="no"),)))
    assert after.failure == Failure(kind="UserError", message="no")
    assert (after.token, after.members) == (first.token, first.members)


def test_a_sign_of_life_counts_for_the_group_that_is_there() -> None:
    group = begin_group(EMPTY, proposal(0))
    assert renew(group, 1).signs_of_life == 1
    assert renew(group, 0) == group


def test_another_launcher_fences_the_group_off_but_not_a_result() -> None:
    group = begin_group(EMPTY, proposal(0))
    assert (launched_elsewhere(group).token, launched_elsewhere(group).members) == (2, ())
    finished = replace(group, result=RESULT)
    assert launched_elsewhere(finished) == finished


def test_a_secret_is_made_once() -> None:
    record = with_secret(EMPTY)
    assert len(record.secret) == 64
    assert with_secret(record) == record


@given(st.lists(st.tuples(st.integers(0, 6), st.sets(st.integers(0, 3), min_size=1), st.booleans()), max_size=30))
@settings(derandomize=True, max_examples=200)
def test_no_two_groups_share_a_token(moves: list[tuple[int, set[int], bool]]) -> None:
    """Whatever is proposed, in whatever order; and a token never falls."""
    record = EMPTY
    groups: dict[int, tuple[Member, ...]] = {0: ()}
    for expected, nodes, is_renewed in moves:
        before = record
        record = begin_group(record, proposal(*sorted(nodes), after=expected))
        if is_renewed:
            record = renew(record, expected)
        assert record.token == before.token + (expected == before.token)
        assert groups.setdefault(record.token, record.members) == record.members


# ---- when to give up -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["UserError", "DeterministicError", "DamagedError"])
def test_an_error_that_no_restart_heals_stops_the_run_at_once(kind: str) -> None:
    latest = departure(1, kind=kind, cause="step 5: samples a, b")
    failure = failure_to_report(replace(EMPTY, departures=(latest,)), latest, max_restarts=20)
    assert failure is not None
    assert (failure.kind, failure.message) == (kind, "step 5: samples a, b")


def test_the_same_exception_at_the_same_step_twice_stops_the_run() -> None:
    first, second = departure(1), departure(2)
    assert failure_to_report(replace(EMPTY, departures=(first,)), first, max_restarts=20) is None
    failure = failure_to_report(replace(EMPTY, departures=(first, second)), second, max_restarts=20)
    assert failure is not None
    assert failure.kind == "DeterministicError"
    assert "twice the same failure at step 5: boom" in failure.message


@pytest.mark.parametrize(
    "second",
    [
        departure(1, node=1),
        departure(2, step=6),
        departure(2, cause="bang"),
        departure(2, kind="InfrastructureError"),
        departure(2, kind="PeerLost"),
        departure(2, kind="Killed"),
    ],
    ids=["same token", "other step", "other cause", "infrastructure", "peer lost", "killed"],
)
def test_other_second_failures_do_not(second: Departure) -> None:
    record = replace(EMPTY, departures=(departure(1), second))
    assert failure_to_report(record, second, max_restarts=20) is None


def test_killed_again_and_again_at_the_same_step_is_not_deterministic() -> None:
    killed = tuple(departure(token, kind="Killed", step=0) for token in range(1, 6))
    assert failure_to_report(replace(EMPTY, departures=killed), killed[-1], max_restarts=5) is None


def test_too_many_restarts_without_a_checkpoint_stop_the_run() -> None:
    killed = tuple(departure(token, kind="Killed", cause=f"kill {token}") for token in range(1, 5))
    failure = failure_to_report(replace(EMPTY, departures=killed), killed[-1], max_restarts=3)
    assert failure is not None
    assert failure.kind == "InfrastructureError"
    assert "4 restarts that came no further than before; the last: kill 4" in failure.message


def test_restarts_that_came_further_are_not_in_vain() -> None:
    killed = tuple(departure(token, kind="Killed", step=10 * token) for token in range(1, 9))
    assert failure_to_report(replace(EMPTY, departures=killed), killed[-1], max_restarts=1) is None
    stuck = (*killed, departure(9, kind="Killed", step=80), departure(10, kind="Killed", step=80))
    assert failure_to_report(replace(EMPTY, departures=stuck), stuck[-1], max_restarts=2) is not None


def test_preemptions_are_no_restarts() -> None:
    preempted = tuple(departure(token, kind="Preempted") for token in range(1, 9))
    assert failure_to_report(replace(EMPTY, departures=preempted), preempted[-1], max_restarts=1) is None


def test_a_new_checkpoint_starts_the_count_anew() -> None:
    killed = tuple(departure(token, kind="Killed") for token in range(1, 5))
    record = replace(EMPTY, departures=killed, checkpoints=(CheckpointRef(step=9, token=1, sha256="s"),))
    assert failure_to_report(record, killed[-1], max_restarts=3) is None


def test_two_nodes_leaving_one_group_are_one_restart() -> None:
    killed = tuple(departure(token, node=node, kind="Killed") for token in (1, 2) for node in range(3))
    assert failure_to_report(replace(EMPTY, departures=killed), killed[-1], max_restarts=2) is None
