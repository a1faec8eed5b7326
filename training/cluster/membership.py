"""Who trains together: pure functions from one run record to the next. The agents apply them by compare-and-set.

Each group has a token of its own, greater than all before; whoever holds an older one is fenced off.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from training.runs.failures import CRASHED, FOR_GOOD, MAX_ALIKE, NOT_FOUND, PREEMPTION, class_of
from training.runs.record import Departure, Failure, Member, Record


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The next group, as one of its nodes proposes it."""

    expected_token: int
    """It follows the group of this token, and no other."""
    generation: int
    members: tuple[Member, ...]
    """In the order of ranks."""
    departures: tuple[Departure, ...]
    """Why the group before is no more."""
    max_restarts: int


def is_over(record: Record, generation: int) -> bool:
    """Nothing is left to do in this generation."""
    return bool(record.result or record.failure or record.generation != generation)


def begin_group(record: Record, proposal: Proposal) -> Record:
    """The record with the proposed group, or with a failure for good if the departures amount to one.

    It stays as it is if another group was quicker, or the run is over.
    """
    if record.token != proposal.expected_token or is_over(record, proposal.generation):
        return record
    new = tuple(departure for departure in proposal.departures if departure not in record.departures)
    record = replace(record, departures=(*record.departures, *new))
    failure = _failure(record, new, max_restarts=proposal.max_restarts)
    if failure is not None:
        return replace(record, failure=failure)
    return replace(
        record, token=record.token + 1, members=proposal.members, num_nodes=len(proposal.members), signs_of_life=0
    )


def with_secret(record: Record) -> Record:
    """Records made before agents spoke to one another have none."""
    return record if record.secret else replace(record, secret=secrets.token_hex(32))


def renew(record: Record, token: int) -> Record:
    """A sign of life of the group of `token`, for those who cannot reach it."""
    return replace(record, signs_of_life=record.signs_of_life + 1) if record.token == token else record


def launched_elsewhere(record: Record) -> Record:
    """The record with a new token for a group that another launcher formed. A finished run has no next group."""
    if record.result is not None:
        return record
    return replace(record, token=record.token + 1, members=(), num_nodes=0)


def _failure(record: Record, new: Sequence[Departure], *, max_restarts: int) -> Failure | None:
    """The one that names records, of several."""
    found = [failure_to_report(record, departure, max_restarts=max_restarts) for departure in new]
    failures = [failure for failure in found if failure is not None]
    return max(failures, key=lambda failure: len(failure.records), default=None)


def failure_to_report(record: Record, latest: Departure, *, max_restarts: int) -> Failure | None:
    """Whether the run should stop for good after `latest`, and why (training.runs.failures).

    At once for errors that a restart cannot heal; after the same error at the same step, so many times; after so many
    restarts for want of memory without a new checkpoint; and after `max_restarts` restarts of any kind in a row that
    came no further, and without a new checkpoint.
    """
    policy = class_of(latest.class_name)
    if latest.class_name in FOR_GOOD:
        return Failure(kind=latest.class_name, message=latest.cause, records=latest.records)
    counting = [d for d in record.departures if d.token > record.forgiven_token]
    counting = [d for d in counting if class_of(d.class_name) is not PREEMPTION]
    same = [d for d in counting if (d.cause, d.step) == (latest.cause, latest.step)]
    most = MAX_ALIKE.get(latest.class_name)
    if most is not None and len({d.token for d in same}) >= most:
        times = {2: "twice", 3: "three times"}[most]
        about = f"{times} the same failure at step {latest.step}: {latest.cause}"
        return Failure(kind=policy.kind, message=f"{about}{NOT_FOUND if latest.class_name == CRASHED else ''}")
    newest = record.checkpoints[-1].token if record.checkpoints else 0
    since = [d for d in counting if d.token > newest]
    alike = {d.token for d in since if class_of(d.class_name) is policy}
    if policy.max_in_vain is not None and len(alike) >= policy.max_in_vain:
        return Failure(
            kind=policy.kind,
            message=f"{policy.name}, {len(alike)} times since the newest checkpoint: {latest.cause}. What helps:"
            f" {policy.advice}",
        )
    restarts = _restarts_in_vain(since)
    if restarts > max_restarts:
        return Failure(
            kind="InfrastructureError",
            message=f"{restarts} restarts that came no further than before; the last: {latest.cause}",
        )
    return None


def _restarts_in_vain(departures: Sequence[Departure]) -> int:
    """How many of the last groups in a row ended at no later step than one before them, and the one before them."""
    furthest = {token: max(d.step for d in departures if d.token == token) for token in {d.token for d in departures}}
    count, best = 0, -1
    for token in sorted(furthest):
        count = 1 if furthest[token] > best else count + 1
        best = max(best, furthest[token])
    return count
