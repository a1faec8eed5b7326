"""Who trains together: pure functions from one run record to the next. The agents apply them by compare-and-set.

A group forms under a token until all its nodes are there; whoever leaves a full group begins the next one. So no two
groups ever hold the same token, and a node that was left behind finds a newer token and is fenced off.
"""

from __future__ import annotations

from dataclasses import replace

from training.record import Departure, Failure, Member, Record


def join(record: Record, me: Member, *, num_nodes: int, maybe_departure: Departure | None = None) -> Record:
    """The record with `me` in the group that forms, or in a new one that I begin.

    `maybe_departure` says why I left the group that I was in before.
    """
    record = _with_departure(record, maybe_departure)
    if me in record.members and (maybe_departure is None or maybe_departure.token != record.token):
        return record
    if _is_forming(record, num_nodes) and all(member.node != me.node for member in record.members):
        members = sorted((*record.members, me), key=lambda member: member.node)
        return replace(record, members=tuple(members))
    return replace(record, token=record.token + 1, members=(me,), num_nodes=num_nodes)


def launched_elsewhere(record: Record) -> Record:
    """The record with a new token for a group that another launcher formed. A finished run has no next group."""
    if record.result is not None:
        return record
    return replace(record, token=record.token + 1, members=(), num_nodes=0)


def is_complete(record: Record) -> bool:
    return record.num_nodes > 0 and len(record.members) == record.num_nodes


def _is_forming(record: Record, num_nodes: int) -> bool:
    return record.num_nodes == num_nodes and 0 < len(record.members) < num_nodes


def _with_departure(record: Record, maybe_departure: Departure | None) -> Record:
    if maybe_departure is None or maybe_departure in record.departures:
        return record
    return replace(record, departures=(*record.departures, maybe_departure))


def failure_to_report(record: Record, latest: Departure, *, max_restarts: int) -> Failure | None:
    """Whether the run should stop for good after `latest`, and why.

    At once for errors that a restart cannot heal; at the second time for the same error at the same step; and after
    `max_restarts` restarts in a row without a new checkpoint.
    """
    if latest.class_name in ("UserError", "DeterministicError", "DamagedError"):
        return Failure(kind=latest.class_name, message=latest.cause)
    counting = [d for d in record.departures if d.token > record.forgiven_token]
    same = [d for d in counting if (d.cause, d.step) == (latest.cause, latest.step)]
    if latest.class_name == "Exception" and len({d.token for d in same}) > 1:
        return Failure(
            kind="DeterministicError", message=f"twice the same failure at step {latest.step}: {latest.cause}"
        )
    newest = record.checkpoints[-1].token if record.checkpoints else 0
    restarts = {d.token for d in counting if d.token > newest}
    if len(restarts) > max_restarts:
        return Failure(
            kind="InfrastructureError",
            message=f"{len(restarts)} restarts without a new checkpoint; the last: {latest.cause}",
        )
    return None
