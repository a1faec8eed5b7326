"""What a drill complains of, although a run may have come to the right bits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tasks.drill.faults import AllKilled, NodeFrozen, RankStopped, StoreAway, WorkerKilled
from tasks.drill.gate import Gate
from tasks.drill.judge import Struck, _broken_promises, _differences, _times, always_promised
from tasks.drill.matrix import NUM_TRIES, _Drill
from training.runs.events import Event
from training.runs.record import CheckpointRef, Departure, Failure, Member, Record, Result

NEWEST = CheckpointRef(step=20, token=1, sha256="a")
RESULT = Result(step=100, weights_sha256="w", state_sha256="s", checkpoint=NEWEST)
POINTS = [(1, 0.5, 1.0, "line")]
CALM: Any = SimpleNamespace(points=POINTS, calm=SimpleNamespace(state_sha256="s", weights_sha256="w"))


def member(node: int, incarnation: str) -> Member:
    return Member(node=node, incarnation=incarnation, address="127.0.0.1", port=1)


def attempt(token: int, step: int, source: str) -> Event:
    return Event(kind="attempt", time=float(token), token=token, step=step, values={"source": source})


def departure(class_name: str, token: int = 1) -> Departure:
    return Departure(token=token, node=1, cause="gone", step=24, class_name=class_name)


def watched(record: Record, *events: Event, members: tuple[Member, ...] = (), token_before: int = 0) -> Any:
    """A run, as far as it is judged."""
    named = Record(key="k", members=members or (member(0, "a"), member(1, "b")))
    trial = SimpleNamespace(token_before=token_before)
    return SimpleNamespace(trial=trial, record=record, events=list(events), changes=[(0.0, named)])


def struck(fault: Any) -> Struck:
    found = Struck(fault, start_seconds=1.0)
    found.maybe_at, found.token, found.maybe_newest = 1.5, 1, NEWEST
    fault.evidence = "seen"
    return found


def record(**changes: Any) -> Record:
    return Record(
        key="k", **{"token": 2, "resume_steps": (0, 24), "checkpoints": (NEWEST,), "result": RESULT, **changes}
    )


STARTED = attempt(1, 0, "start")


def test_a_run_that_goes_on_as_promised() -> None:
    seen = watched(record(departures=(departure("Hung"),)), STARTED, attempt(2, 24, "memory"))
    assert _broken_promises(seen, struck(RankStopped())) == []
    assert always_promised(seen, num_nodes=2) == []


def test_a_cause_that_was_not_noted() -> None:
    seen = watched(record(), STARTED, attempt(2, 24, "memory"))
    (complaint,) = _broken_promises(seen, struck(RankStopped()))
    assert complaint == "the record should say Hung, and says nothing"


def test_memory_that_was_not_used() -> None:
    step = Event(kind="step", time=1.9, token=1, step=24)
    seen = watched(record(resume_steps=(0, 20)), STARTED, step, attempt(2, 20, "checkpoint"))
    found = _broken_promises(seen, struck(WorkerKilled()))
    assert found == [
        "a group began with a checkpoint, although a process held the state",
        "4 steps were done again, although a process held the state",
    ]
    assert _broken_promises(seen, struck(AllKilled())) == [], "nobody held it"


def test_a_step_that_only_the_frozen_node_had_finished() -> None:
    step = Event(kind="step", time=1.9, token=1, step=25)
    gone = record(departures=(departure("NodeLost"),))
    seen = watched(gone, STARTED, step, attempt(2, 24, "memory"))
    assert _broken_promises(seen, struck(NodeFrozen())) == []


def test_a_checkpoint_that_was_passed_over() -> None:
    seen = watched(record(resume_steps=(0, 10)), STARTED, attempt(2, 10, "checkpoint"))
    assert _broken_promises(seen, struck(AllKilled())) == ["it went on from step 10, although checkpoint 20 was proven"]


def test_ranks_that_regroup_for_nothing() -> None:
    seen = watched(record(), STARTED, attempt(2, 24, "memory"))
    said = "ranks regrouped, although all were well; what the record says of it: "
    with Gate("127.0.0.1", 1) as gate:
        assert _broken_promises(seen, struck(StoreAway(gate))) == [f"{said}nothing"]
        lost = watched(record(departures=(departure("NodeLost"),)), *seen.events)
        assert _broken_promises(lost, struck(StoreAway(gate))) == [f"{said}node 1: gone"]
    assert always_promised(seen, num_nodes=2) == ["ranks regrouped 1 times, and had reason to 0 times"]
    assert always_promised(seen, num_nodes=2, num_returns=1) == []
    replaced = (member(0, "a"), member(1, "b"), member(1, "c"))
    assert always_promised(watched(record(), *seen.events, members=replaced), num_nodes=2) == []


def test_a_group_that_ended_before_it_began_is_one_too_many_if_nothing_happened() -> None:
    assert always_promised(watched(record(), STARTED), num_nodes=2) == [
        "ranks regrouped 1 times, and had reason to 0 times"
    ]
    lost = record(departures=(departure("NodeLost"),))
    assert always_promised(watched(lost, STARTED), num_nodes=2) == []


def test_groups_are_counted_from_where_the_run_began() -> None:
    assert always_promised(watched(record(token=35), STARTED, token_before=34), num_nodes=2) == []


def test_a_newest_checkpoint_that_is_named_no_more() -> None:
    told = Event(kind="checkpoint", time=2.0, token=1, step=40)
    assert always_promised(watched(record(token=1), STARTED, told), num_nodes=2) == [
        "checkpoint 40 was proven, and the record names none after step 20"
    ]


def test_other_bits() -> None:
    assert _differences(record(), POINTS, CALM) == []
    other = Result(step=100, weights_sha256="w", state_sha256="t", checkpoint=NEWEST)
    assert _differences(record(result=other), [], CALM) == [
        "the state is another: t, not s",
        "the history is another from step 1 on",
    ]
    assert _differences(record(result=None), POINTS, CALM) == ["the run did not end"]
    failure = Failure(kind="InfrastructureError", message="too many restarts")
    assert _differences(record(result=None, failure=failure), POINTS, CALM) == ["the run failed: too many restarts"]


def test_a_fault_was_noticed_before_the_next_step_however_late_anybody_looked() -> None:
    step = Event(kind="step", time=1.9, token=2, step=25)
    seen = watched(record(), STARTED, attempt(2, 24, "memory"), step)
    for changed_at, seconds in ((1.75, 0.25), (3.0, 0.4)):
        seen.first_token_change = lambda token, at=changed_at: at
        found = _times(seen, struck(WorkerKilled()))
        assert (round(found["detect_seconds"] or 0, 3), round(found["next_step_seconds"] or 0, 3)) == (seconds, 0.4)


def test_a_run_that_was_over_before_it_was_struck_is_done_again() -> None:
    for num_missed, bits_equal, expected in ((1, True, 2), (NUM_TRIES, True, NUM_TRIES), (NUM_TRIES, False, 1)):
        tries: list[Struck] = []

        def try_it(*_: Any, number: int = num_missed, equal: bool = bits_equal, tries: list[Struck] = tries) -> Any:
            tries.append(struck(WorkerKilled()))
            tries[-1].maybe_at = None if len(tries) <= number else 1.5
            return tries[-1], SimpleNamespace(bits_equal=equal)

        _Drill._suffer(SimpleNamespace(_struck_run=try_it), None, "worker-killed", None, "")  # type: ignore[arg-type]
        assert len(tries) == expected
