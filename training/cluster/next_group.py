"""What a node proposes: who would train together next, and why the group before is no more.

Pure functions of the run record and of what nodes tell one another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from training.cluster.protocol import Status
from training.runs.record import Departure, Record

FIRST_HOLD_OFF_SECONDS, LONGEST_HOLD_OFF_SECONDS = 0.5, 60.0


def choose(ready: Iterable[Status], record: Record, *, num_nodes: int, nodes_per_replica: int) -> list[Status]:
    """As many as all reach one another and make whole replicas, at most `num_nodes`, members of the last group first;
    nobody, if the first of `ready`, who asks, is not among them."""
    own, *_ = ready = list(ready)
    chosen = _all_linked(_one_of_each_node(ready, record), own)
    size = min(len(chosen), num_nodes)
    chosen = chosen[: size - size % nodes_per_replica]
    return chosen if own in chosen else []


def _one_of_each_node(ready: Sequence[Status], record: Record) -> list[Status]:
    """By seniority. Of two agents of a node it is the one that more can reach, else the senior."""
    before = {member.incarnation for member in record.members}
    by_seniority = sorted(ready, key=lambda s: (s.member.incarnation not in before, s.member.node))
    nodes: dict[int, Status] = {}
    for status in by_seniority:
        other = nodes.get(status.member.node)
        if other is None or _num_reached(status, ready) > _num_reached(other, ready):
            nodes[status.member.node] = status
    return [status for status in by_seniority if nodes[status.member.node] is status]


def _all_linked(chosen: list[Status], own: Status) -> list[Status]:
    """Without those, one after another, that the fewest others are linked with."""
    reached = {status.member.incarnation: {status.member.incarnation, *status.reaches} for status in chosen}

    def num_links(status: Status) -> int:
        name = status.member.incarnation
        others = (other.member.incarnation for other in chosen)
        return sum(name in reached[other] and other in reached[name] for other in others)

    while odd := [s for s in chosen if s is not own and num_links(s) < len(chosen)]:
        chosen.remove(min(reversed(odd), key=num_links))
    return chosen


def reach(one: Status, other: Status) -> bool:
    """Each the other."""
    return one.member.incarnation in other.reaches and other.member.incarnation in one.reaches


def _num_reached(status: Status, others: Iterable[Status]) -> int:
    """Of other nodes."""
    return sum(reach(status, other) for other in others if other.member.node != status.member.node)


def hold_off_seconds(node: int, record: Record) -> float:
    """A node that failed again and again since the newest checkpoint waits longer each time before it is taken in."""
    newest = record.checkpoints[-1].token if record.checkpoints else 0
    times = sum(departure.node == node and departure.token >= newest for departure in record.departures)
    return min(LONGEST_HOLD_OFF_SECONDS, FIRST_HOLD_OFF_SECONDS * 2.0**times) if times > 1 else 0.0


def departures(record: Record, ready: Sequence[Status], preempted: Collection[str]) -> tuple[Departure, ...]:
    """Why the group of `record` is no more: what its living members say, and who is not among them. `preempted` said
    that they must go."""
    told = [status.maybe_departure for status in ready if status.maybe_departure is not None]
    told = [departure for departure in told if departure.class_name != "PeerLost"] or told[:1]
    here = {status.member.incarnation for status in ready}
    furthest = max(_first_step(record), *(status.step for status in ready))  # if nobody is left, nobody knows more
    gone = [
        Departure(
            token=record.token,
            node=member.node,
            cause=f"node {member.node} " + ("had to go" if member.incarnation in preempted else "is gone"),
            step=furthest,
            class_name="Preempted" if member.incarnation in preempted else "NodeLost",
        )
        for member in record.members
        if member.incarnation not in here
    ]
    return (*told, *gone)


def _first_step(record: Record) -> int:
    """That its group began from; 0 if it never did."""
    maybe_step = next(iter(record.resume_steps[record.token - 1 : record.token]), None)
    return maybe_step or 0
