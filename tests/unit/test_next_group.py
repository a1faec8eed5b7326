"""Whom a node proposes, and why the group before is no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from training.cluster.next_group import choose, departures, hold_off_seconds
from training.cluster.protocol import Status
from training.runs.record import CheckpointRef, Departure, Member, Record


def member(node: int) -> Member:
    return Member(node=node, incarnation=str(node), address="a", port=1)


def group(*nodes: int) -> Record:
    return Record(key="k", token=3, members=tuple(map(member, nodes)), num_nodes=len(nodes))


def ready(*nodes: int, cut: Iterable[tuple[int, int]] = ()) -> list[Status]:
    """They reach one another, but for pairs that are cut off from one another."""
    return [
        Status(
            member=member(node),
            token=3,
            phase="idle",
            reaches=tuple(str(n) for n in nodes if n != node and (n, node) not in cut and (node, n) not in cut),
            sees_store=True,
            is_leaving=False,
            step=node,
            maybe_departure=None,
        )
        for node in nodes
    ]


def chosen(statuses: list[Status], record: Record, *, num_nodes: int = 4, nodes_per_replica: int = 1) -> list[int]:
    found = choose(statuses, record, num_nodes=num_nodes, nodes_per_replica=nodes_per_replica)
    return [status.member.node for status in found]


def departure(node: int, *, token: int = 3, class_name: str = "Exception") -> Departure:
    return Departure(token=token, node=node, cause="c", step=1, class_name=class_name)


@pytest.mark.parametrize(
    ("nodes", "nodes_per_replica", "expected"),
    [
        ((2, 0, 1), 1, [1, 2, 0]),
        ((2, 0, 1), 2, [1, 2]),
        ((2, 0, 1, 3), 2, [1, 2, 0, 3]),
        ((2, 0, 1, 3, 4), 2, [1, 2, 0, 3]),
        ((2, 0, 1, 3), 3, [1, 2, 0]),
        ((2, 1), 3, []),
    ],
)
def test_members_come_first_and_make_whole_replicas(
    nodes: tuple[int, ...], nodes_per_replica: int, expected: list[int]
) -> None:
    assert chosen(ready(*nodes), group(1, 2), nodes_per_replica=nodes_per_replica) == expected


def test_who_is_left_over_chooses_nobody() -> None:
    """The others do, and they alone know best."""
    assert chosen(ready(0, 1, 2), group(1, 2), nodes_per_replica=2) == []


def test_a_replica_is_filled_by_whoever_all_reach() -> None:
    assert chosen(ready(0, 1, 2, 3, cut=[(2, 3)]), group(0, 1), nodes_per_replica=2) == [0, 1]
    assert chosen(ready(0, 1, 2, 3, cut=[(1, 3)]), group(0, 1, 3), nodes_per_replica=3) == [0, 1, 2]


def test_who_failed_again_and_again_since_the_checkpoint_is_held_off_for_longer() -> None:
    def failed(times: int, *, checkpoint: int = 0) -> Record:
        reference = CheckpointRef(step=1, token=checkpoint, sha256="s")
        all_departures = tuple(departure(1, token=token) for token in range(1, times + 1))
        return replace(group(0), departures=all_departures, checkpoints=(reference,))

    assert [hold_off_seconds(1, failed(times)) for times in (0, 1, 2, 3, 6, 7, 40)] == [0, 0, 2, 4, 32, 60, 60]
    assert hold_off_seconds(0, failed(7)) == 0
    assert hold_off_seconds(1, failed(7, checkpoint=6)) == 2


def test_who_is_not_there_is_lost_or_had_to_go() -> None:
    found = departures(group(0, 1, 2), ready(0), {"2"})
    assert [(one.node, one.class_name) for one in found] == [(1, "NodeLost"), (2, "Preempted")]


def test_that_a_peer_was_lost_is_told_only_if_nobody_says_why() -> None:
    told = [replace(one, maybe_departure=departure(one.member.node, class_name="PeerLost")) for one in ready(0, 1)]
    assert [one.node for one in departures(group(0, 1), told, ())] == [0]
    told[1] = replace(told[1], maybe_departure=departure(1))
    assert [(one.node, one.class_name) for one in departures(group(0, 1), told, ())] == [(1, "Exception")]


def test_a_group_of_which_nobody_is_left_came_to_where_it_began_at_least() -> None:
    begun = replace(group(0, 1), token=2, resume_steps=(0, 40))
    assert [one.step for one in departures(begun, ready(0), ())] == [40]
    assert [one.step for one in departures(begun, [replace(*ready(0), step=45)], ())] == [45]
    assert [one.step for one in departures(replace(begun, token=3), ready(0), ())] == [0]
