"""Events: each arrives once, in order; a store that is away only delays them; and which steps count."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.fakes import FaultyStore
from tests.waiting import wait_until
from training.errors import DamagedError, InfrastructureError
from training.runs import events as events_module
from training.runs.events import Event, EventReader, EventWriter, chunk_key, committed
from training.runs.record import Record, with_resume_step
from training.s3.objectstore import Store

PREFIX = "runs/k/0/"


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are sent when a test says so."""
    monkeypatch.setattr(events_module, "FLUSH_SECONDS", 3600.0)


def add_steps(writer: EventWriter, steps: range) -> None:
    for step in steps:
        writer.add("step", step=step, **values_of(step))


def values_of(step: int) -> dict[str, float]:
    return {"loss": step / 10, "grad_norm": 1.0, "learning_rate": 0.1, "samples_per_second": 9.0}


def read_steps(reader: EventReader, *, newest_token: int) -> list[tuple[int, int]]:
    return [(event.token, event.step) for event in reader.read_new(newest_token=newest_token)]


# ---- writing and reading ---------------------------------------------------------------------------------------------


def test_events_arrive_once_in_order_with_their_values(store: Store) -> None:
    writer = EventWriter(store, PREFIX, 1)
    reader = EventReader(store, PREFIX)
    add_steps(writer, range(1, 4))
    assert read_steps(reader, newest_token=1) == []
    writer.flush()
    first = list(reader.read_new(newest_token=1))
    assert [(e.kind, e.token, e.step, e.values) for e in first] == [
        ("step", 1, step, values_of(step)) for step in (1, 2, 3)
    ]
    assert first[0].time <= first[1].time <= first[2].time
    add_steps(writer, range(4, 6))
    writer.flush()
    writer.flush()
    add_steps(writer, range(6, 7))
    writer.close()
    assert read_steps(reader, newest_token=1) == [(1, 4), (1, 5), (1, 6)]
    assert read_steps(reader, newest_token=1) == []
    assert [key for key, _ in store.list_keys("")] == [chunk_key(PREFIX, 1, number) for number in range(3)]


@pytest.mark.parametrize(("was", "now"), [(b'{"kind"', b'["kind"'), (b'"kind"', b'"kine"'), (b'"step"', b'"ste\xf0"')])
def test_a_damaged_chunk_is_named(store: Store, was: bytes, now: bytes) -> None:
    writer = EventWriter(store, PREFIX, 1)
    add_steps(writer, range(1, 3))
    writer.close()
    key = chunk_key(PREFIX, 1, 0)
    store.put(key, store.get(key).replace(was, now, 1))
    with pytest.raises(DamagedError, match=key):
        read_steps(EventReader(store, PREFIX), newest_token=1)


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        ("attempt", {"source": "memory"}, "world_size"),
        ("attempt", {"world_size": "x"}, "world_size"),
        ("step", {}, "loss"),
        ("step", {**values_of(1), "loss": "a"}, "loss"),
        ("step", {**values_of(1), "seconds": None}, "seconds"),
        ("step", {**values_of(1), "validation": [1]}, "validation"),
        ("step", {**values_of(1), "loss": "nan"}, "loss"),
        ("step", {**values_of(1), "validation": {"loss": "a"}}, "validation"),
        ("pace", {"straggler": {"rank": 1}}, "straggler"),
        ("balance", {"shares": ["4", 5]}, "shares"),
        ("balance", {"shares": []}, "shares"),
    ],
)
def test_an_event_without_what_its_kind_tells_is_damaged(
    store: Store, kind: str, values: dict[str, object], field: str
) -> None:
    writer = EventWriter(store, PREFIX, 1)
    writer.add(kind, step=1, **values)
    writer.close()
    with pytest.raises(DamagedError, match=rf"000000\.jsonl: .* {field}: "):
        read_steps(EventReader(store, PREFIX), newest_token=1)


@pytest.mark.parametrize("time", ["1e300", "-1", '"inf"', '"nan"'])
def test_an_event_of_no_time_is_damaged(store: Store, time: str) -> None:
    store.put(chunk_key(PREFIX, 1, 0), b'{"kind":"finished","step":1,"time":%s,"values":{}}' % time.encode())
    with pytest.raises(DamagedError, match=r"time .* which is none|time: Input should be a valid number"):
        read_steps(EventReader(store, PREFIX), newest_token=1)


def test_nothing_to_say_makes_no_chunk(store: Store) -> None:
    EventWriter(store, PREFIX, 1).close()
    assert list(store.list_keys("")) == []


def test_the_writer_sends_by_itself(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "FLUSH_SECONDS", 0.01)
    writer = EventWriter(store, PREFIX, 1)
    reader = EventReader(store, PREFIX)
    add_steps(writer, range(1, 3))
    found: list[tuple[int, int]] = []

    def all_there() -> bool:
        found.extend(read_steps(reader, newest_token=1))
        return len(found) == 2

    wait_until(all_there, what="both events")
    writer.close()
    assert found == [(1, 1), (1, 2)]


def test_a_reader_goes_on_to_newer_tokens_and_over_those_that_said_nothing(store: Store) -> None:
    reader = EventReader(store, PREFIX)
    for token, steps in ((1, range(1, 4)), (3, range(3, 5)), (4, range(5, 6))):
        writer = EventWriter(store, PREFIX, token)
        add_steps(writer, steps)
        writer.close()
    assert read_steps(reader, newest_token=1) == [(1, 1), (1, 2), (1, 3)]
    assert read_steps(reader, newest_token=3) == [(3, 3), (3, 4)]
    assert read_steps(reader, newest_token=4) == [(4, 5)]
    assert read_steps(EventReader(store, PREFIX), newest_token=4)[-1] == (4, 5)


def test_chunks_are_json_lines(store: Store) -> None:
    writer = EventWriter(store, PREFIX, 1)
    add_steps(writer, range(1, 3))
    writer.close()
    lines = store.get(chunk_key(PREFIX, 1, 0)).splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


# ---- a store that is away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_first", [False, True], ids=["not applied", "reply lost"])
def test_a_store_that_is_away_only_delays(store: Store, apply_first: bool) -> None:
    """Also where the PUT was applied and its reply lost, and a reader was quick to see it."""
    away = [True]
    faulty = FaultyStore(store, lambda key: away[0], apply_first=apply_first)
    writer = EventWriter(faulty, PREFIX, 1)
    reader = EventReader(store, PREFIX)
    add_steps(writer, range(1, 3))
    with pytest.raises(InfrastructureError):
        writer.flush()
    assert faulty.num_faults == 1
    found = read_steps(reader, newest_token=1)
    add_steps(writer, range(3, 5))
    away[0] = False
    writer.flush()
    add_steps(writer, range(5, 6))
    writer.close()
    found += read_steps(reader, newest_token=1)
    assert found == [(1, step) for step in range(1, 6)]
    assert read_steps(EventReader(store, PREFIX), newest_token=1) == found


def test_the_senders_thread_outlives_a_store_that_is_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_module, "FLUSH_SECONDS", 0.01)
    away = [True]
    faulty = FaultyStore(store, lambda key: away[0])
    writer = EventWriter(faulty, PREFIX, 1)
    add_steps(writer, range(1, 3))
    wait_until(lambda: faulty.num_faults >= 3, what="three vain attempts")
    away[0] = False
    wait_until(lambda: store.exists(chunk_key(PREFIX, 1, 0)), what="the chunk")
    writer.close()
    assert read_steps(EventReader(store, PREFIX), newest_token=1) == [(1, 1), (1, 2)]


def test_closing_while_the_store_is_away_says_so(store: Store) -> None:
    writer = EventWriter(FaultyStore(store, lambda key: True), PREFIX, 1)
    add_steps(writer, range(1, 2))
    with pytest.raises(InfrastructureError):
        writer.close()


# ---- which steps count -----------------------------------------------------------------------------------------------


def step_event(token: int, step: int) -> Event:
    return Event(kind="step", time=0.0, token=token, step=step, values={"loss": token})


def run_of(*attempts: tuple[int, range]) -> list[Event]:
    return [step_event(token, step) for token, steps in attempts for step in steps]


def counted(events: list[Event], resume_steps: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(event.step, event.token) for event in committed(events, resume_steps)]


def test_all_steps_of_the_only_attempt_count() -> None:
    assert counted(run_of((1, range(1, 4))), (0,)) == [(1, 1), (2, 1), (3, 1)]


def test_what_an_attempt_did_beyond_the_next_ones_start_does_not_count() -> None:
    events = run_of((1, range(1, 8)), (2, range(5, 10)))
    assert counted(events, (0, 4)) == [*((s, 1) for s in range(1, 5)), *((s, 2) for s in range(5, 10))]


def test_nor_what_it_did_beyond_the_start_of_any_later_one() -> None:
    events = run_of((1, range(1, 8)), (2, range(7, 10)), (3, range(3, 6)))
    assert counted(events, (0, 6, 2)) == [(1, 1), (2, 1), (3, 3), (4, 3), (5, 3)]


def test_only_steps_count() -> None:
    events = [replace(step_event(1, 1), kind="checkpoint"), step_event(1, 1)]
    assert committed(events, (0,)) == [step_event(1, 1)]


def test_nothing_counts_twice_if_it_is_read_twice() -> None:
    events = run_of((1, range(1, 4)))
    assert counted([*events, *events], (0,)) == [(1, 1), (2, 1), (3, 1)]


def test_a_token_that_never_began_takes_nothing_from_the_others() -> None:
    """Token 2's group formed, and fell apart before it resumed; token 3 went on from step 4."""
    record = with_resume_step(Record(key="k", token=1), 0, token=1)
    record = with_resume_step(replace(record, token=3), 4, token=3)
    events = run_of((1, range(1, 8)), (3, range(5, 10)))
    assert counted(events, record.resume_steps) == [
        *((step, 1) for step in range(1, 5)),
        *((step, 3) for step in range(5, 10)),
    ]


@given(st.data())
@settings(derandomize=True, max_examples=150)
def test_a_finished_run_has_each_step_once(data: st.DataObject) -> None:
    """Attempts that each resume from a checkpoint of before, do some steps and die; some never begin."""
    num_steps, checkpoint_every = 12, 3
    record, events, newest_checkpoint = Record(key="k"), [], 0
    finished = False
    while not finished:
        token = record.token + 1
        record = replace(record, token=token)
        if token < 8 and data.draw(st.booleans()):
            continue
        start = newest_checkpoint
        record = with_resume_step(record, start, token=token)
        stop = num_steps if token >= 8 else data.draw(st.integers(start, num_steps))
        events += run_of((token, range(start + 1, stop + 1)))
        newest_checkpoint = stop - stop % checkpoint_every
        finished = stop == num_steps
    assert [event.step for event in committed(events, record.resume_steps)] == list(range(1, num_steps + 1))
