"""Who trains together: joins, departures and restarts, as sequences of pure changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.membership import failure_to_report, is_complete, join
from training.record import CheckpointRef, Departure, Member, Record

EMPTY = Record(key="k")


def member(node: int, incarnation: str = "a") -> Member:
    return Member(node=node, incarnation=incarnation, address="127.0.0.1", port=1000 + node)


def departure(token: int, *, node: int = 0, cause: str = "boom", step: int = 5, kind: str = "Exception") -> Departure:
    return Departure(token=token, node=node, cause=cause, step=step, class_name=kind)


def full_group(num_nodes: int = 3) -> Record:
    record = EMPTY
    for node in range(num_nodes):
        record = join(record, member(node), num_nodes=num_nodes)
    return record


def test_the_first_begins_a_group_and_the_others_complete_it() -> None:
    record = join(EMPTY, member(2), num_nodes=3)
    assert (record.token, record.members, is_complete(record)) == (1, (member(2),), False)
    record = join(record, member(0), num_nodes=3)
    assert not is_complete(record)
    record = join(record, member(1), num_nodes=3)
    assert (record.token, record.members) == (1, (member(0), member(1), member(2)))
    assert is_complete(record)


def test_an_empty_record_is_not_complete() -> None:
    assert not is_complete(EMPTY)


def test_joining_again_changes_nothing() -> None:
    forming = join(EMPTY, member(0), num_nodes=2)
    assert join(forming, member(0), num_nodes=2) == forming
    full = join(forming, member(1), num_nodes=2)
    assert join(full, member(1), num_nodes=2) == full


def test_a_restarted_node_of_a_forming_group_begins_the_next_and_the_others_follow() -> None:
    record = join(EMPTY, member(0), num_nodes=2)
    record = join(record, member(0, "b"), num_nodes=2)
    assert (record.token, record.members) == (2, (member(0, "b"),))
    record = join(record, member(1), num_nodes=2)
    assert (record.token, record.members) == (2, (member(0, "b"), member(1)))


def test_a_restarted_node_of_a_full_group_fences_the_group_off() -> None:
    record = join(full_group(), member(1, "b"), num_nodes=3)
    assert (record.token, record.members) == (2, (member(1, "b"),))
    for node in (0, 2):
        record = join(record, member(node, "b"), num_nodes=3, maybe_departure=departure(1, node=node))
    assert record.token == 2
    assert is_complete(record)
    assert [d.node for d in record.departures] == [0, 2]


def test_who_leaves_a_full_group_begins_the_next_even_under_the_same_incarnation() -> None:
    record = join(full_group(), member(1), num_nodes=3, maybe_departure=departure(1, node=1))
    assert (record.token, record.members) == (2, (member(1),))
    assert record.departures == (departure(1, node=1),)


def test_a_departure_is_noted_once_however_often_it_is_told() -> None:
    record = full_group()
    for _ in range(3):
        record = join(record, member(1, "b"), num_nodes=3, maybe_departure=departure(1, node=1))
    assert (record.token, record.members) == (2, (member(1, "b"),))
    assert len(record.departures) == 1


def test_another_number_of_nodes_begins_a_new_group() -> None:
    forming = join(EMPTY, member(0), num_nodes=3)
    record = join(forming, member(1), num_nodes=2)
    assert (record.token, record.members, record.num_nodes) == (2, (member(1),), 2)


def test_a_fresh_generation_is_formed_from_nothing() -> None:
    record = join(Record(key="k", generation=1, token=4), member(0), num_nodes=1)
    assert record.token == 5
    assert is_complete(record)


@given(st.integers(1, 4), st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30))
@settings(derandomize=True, max_examples=200)
def test_no_two_full_groups_share_a_token(num_nodes: int, moves: list[tuple[int, bool]]) -> None:
    """Whatever the order of joins, restarts and departures; and a token never falls."""
    record = EMPTY
    full: dict[int, tuple[Member, ...]] = {}
    incarnations = dict.fromkeys(range(num_nodes), 0)
    for number, (node, restarts) in enumerate(moves):
        node %= num_nodes
        incarnations[node] += restarts
        before = record
        maybe_departure = departure(record.token, node=node, step=number) if restarts and record.token else None
        me = member(node, str(incarnations[node]))
        record = join(record, me, num_nodes=num_nodes, maybe_departure=maybe_departure)
        assert me in record.members
        assert before.token <= record.token <= before.token + 1
        assert len({m.node for m in record.members}) == len(record.members) <= num_nodes
        if is_complete(record):
            assert full.setdefault(record.token, record.members) == record.members


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
    assert "4 restarts without a new checkpoint; the last: kill 4" in failure.message


def test_a_new_checkpoint_starts_the_count_anew() -> None:
    killed = tuple(departure(token, kind="Killed") for token in range(1, 5))
    record = replace(EMPTY, departures=killed, checkpoints=(CheckpointRef(step=9, token=1, sha256="s"),))
    assert failure_to_report(record, killed[-1], max_restarts=3) is None


def test_two_nodes_leaving_one_group_are_one_restart() -> None:
    killed = tuple(departure(token, node=node, kind="Killed") for token in (1, 2) for node in range(3))
    assert failure_to_report(replace(EMPTY, departures=killed), killed[-1], max_restarts=2) is None
