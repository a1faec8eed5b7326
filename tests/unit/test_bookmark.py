"""A follower that begins at a bookmark tells MLflow what one from the start would, whatever was killed before it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

import tasks.follow
from tasks import tracking
from tasks.attempts import begun_by_token
from tasks.bookmark import Bookmark, find_bookmark, keep_bookmark
from tasks.follow import Follower
from tasks.tracking import METRICS, Tracker
from tasks.train import bookmark_of
from tests.unit.fakes import MemoryStore
from training.errors import InfrastructureError
from training.runs.events import START, Event, chunk_key
from training.runs.record import RunRecord

NUM_TOKENS, PREFIX = 4, "runs/k/0/"


class Killed(BaseException):
    """As the process would be."""


class FakeMlflow:
    """Keeps points as MLflow does: one row per (key, time, step, value)."""

    def __init__(self) -> None:
        self.rows: set[tuple[str, int, int, float]] = set()
        self.kill: Callable[[], bool] = lambda: False

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(experiment_id="1"))

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        return [SimpleNamespace(step=row[2]) for row in self.rows if row[0] == key]

    def log_batch(self, run_id: str, metrics: Sequence[Any]) -> None:
        if self.kill():
            raise Killed
        self.rows |= {(point.key, point.timestamp, point.step, point.value) for point in metrics}
        if self.kill():
            raise Killed


def step_event(token: int, step: int, time: float) -> Event:
    return Event(kind="step", time=time, token=token, step=step, values=dict.fromkeys(METRICS, float(step)))


def a_history(chance: random.Random) -> Iterator[tuple[int, list[Event]]]:
    """(token, events of its next chunk): each group goes on from a step that was told, and tells later ones again."""
    told, time = 0, 0.0
    for token in range(1, NUM_TOKENS + 1):
        step = chance.randint(max(0, told - 5), told)
        chunk = [Event(kind="attempt", time=time, token=token, step=step, values={"world_size": token})]
        for _ in range(chance.randint(1, 15)):
            step, time = step + 1, time + 1.0
            chunk.append(step_event(token, step, time))
            if chance.random() < 0.3:
                chunk.append(Event(kind="pace", time=time, token=token, step=step, values={"straggler": None}))
            if chance.random() < 0.2:
                shares = {"shares": [chance.randint(1, 9), chance.randint(1, 9)]}
                chunk.append(Event(kind="balance", time=time, token=token, step=step, values=shares))
            if chance.random() < 0.4:
                yield token, chunk
                chunk = []
        told = max(told, step)
        yield token, chunk


class Writer:
    """Puts the chunks of a history on the store, one by one."""

    def __init__(self, run: RunRecord, chance: random.Random) -> None:
        self._run = run
        self._chunks = list(a_history(chance))
        self._numbers = dict.fromkeys(range(1, NUM_TOKENS + 1), 0)
        self.num_steps = max(event.step for _, chunk in self._chunks for event in chunk)

    def write(self) -> bool:
        """The next one; False if there is none."""
        if not self._chunks:
            return False
        token, events = self._chunks.pop(0)
        self._run.update(lambda record: replace(record, token=token))
        key = chunk_key(self._run.prefix(self._run.read()), token, self._numbers[token])
        self._run.store.put(key, b"".join(event.to_line() for event in events))
        self._numbers[token] += 1
        return True


@pytest.fixture
def run() -> RunRecord:
    run = RunRecord(MemoryStore({}), "k")
    run.create_if_missing()
    return run


def begin(run: RunRecord, client: FakeMlflow) -> tuple[Follower, Tracker]:
    """As the train stage does."""
    tracker = Tracker(client, "uri", "id")  # type: ignore[arg-type]  # it has what is asked of it here
    bookmark = find_bookmark(run.store, run.read(), told_step=tracker.last_step)
    return Follower(run, generation=0, num_steps=1, bookmark=bookmark), tracker


def follow(
    run: RunRecord, client: FakeMlflow, between: Callable[[], bool], is_hasty: Callable[[], bool] = lambda: False
) -> tuple[Follower, list[Event]]:
    """Follow, while something happens `between` two looks. All events that it was given, and the follower, which keeps
    its bookmark before it tells MLflow if it `is_hasty`."""
    follower, tracker = begin(run, client)
    given: list[Event] = []
    while True:
        goes_on = between()
        _, events = follower.look()
        given += events
        if is_hasty():
            follower.keep_bookmark()
        tracker.forward(events)
        if client.kill():
            raise Killed
        follower.keep_bookmark()
        if not goes_on:
            return follower, given


@pytest.mark.parametrize("seed", range(12))
def test_one_point_per_step_and_all_attempts_after_any_kills(
    run: RunRecord, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(tasks.follow, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "BATCH_METRICS", 2 * len(METRICS))
    chance, client = random.Random(seed), FakeMlflow()
    writer, num_killed, positions = Writer(run, chance), 0, set()
    client.kill = lambda: chance.random() < 0.15
    for _ in range(12):
        try:
            follow(run, client, writer.write, is_hasty=lambda: chance.random() < 0.3)
        except Killed:
            num_killed += 1
            positions.add(find_bookmark(run.store, run.read(), told_step=float("inf")).position)
    client.kill = lambda: False
    follower, given = follow(run, client, writer.write)
    assert num_killed > 0
    assert len(positions) > 1, "no follower began at a bookmark"
    assert sorted((name, step) for name, _, step, _ in client.rows) == sorted(
        (name, step) for name in METRICS for step in range(1, writer.num_steps + 1)
    )
    whole = Follower(run, generation=0, num_steps=1)
    _, all_events = whole.look()
    assert begun_by_token(given) == begun_by_token(all_events)
    assert follower.progress == whole.progress


def test_what_lies_before_the_bookmark_is_not_read(run: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.follow, "KEEP_SECONDS", 0.0)
    client, writer = FakeMlflow(), Writer(run, random.Random(1))
    follow(run, client, writer.write)
    rows = set(client.rows)
    bookmark = find_bookmark(run.store, run.read(), told_step=writer.num_steps)
    fetched: list[str] = []
    get = MemoryStore.get
    monkeypatch.setattr(MemoryStore, "get", lambda self, key: (fetched.append(key), get(self, key))[1])
    follow(run, client, lambda: False)
    assert [key for key in fetched if "/events/" in key] == [chunk_key(PREFIX, *bookmark.position)]
    assert bookmark.position > (NUM_TOKENS, 0)
    assert client.rows == rows


def test_bookmark_ahead_of_mlflow_is_not_believed(run: RunRecord) -> None:
    """MLflow lost what it had, or somebody deleted its run: it is told of all again."""
    keep_bookmark(run.store, PREFIX, Bookmark(instance=run.read().instance, position=(1, 9), step=5))
    assert find_bookmark(run.store, run.read(), told_step=5).position == (1, 9)
    assert find_bookmark(run.store, run.read(), told_step=4).position == START


def test_bookmark_of_a_run_that_was_removed_is_not_found(run: RunRecord) -> None:
    """Also if its follower lives, and looks at the run that was begun in its place."""
    keep_bookmark(run.store, PREFIX, Bookmark(instance=run.read().instance, position=(1, 9)))
    follower = Follower(run, generation=0, num_steps=1, bookmark=find_bookmark(run.store, run.read(), told_step=5))
    assert find_bookmark(run.store, replace(run.read(), generation=1), told_step=5).position == START
    del run.store.objects[run.object_key]  # type: ignore[attr-defined]  # it is a MemoryStore
    record = run.create_if_missing()
    follower.look()
    follower.keep_bookmark()
    assert find_bookmark(run.store, record, told_step=5) == Bookmark(instance=record.instance)


def test_follower_that_begins_while_mlflow_is_away_keeps_a_place_for_the_next(run: RunRecord) -> None:
    def away() -> Tracker:
        raise InfrastructureError("away")

    record = run.read()
    begun = bookmark_of(run.store, record, SimpleNamespace(tracker=away))  # type: ignore[arg-type]
    keep_bookmark(run.store, PREFIX, begun.after([step_event(1, 3, 3.0)], (1, 1)))
    assert find_bookmark(run.store, record, told_step=3).position == (1, 1)


def test_damaged_bookmark_is_not_believed(run: RunRecord, caplog: pytest.LogCaptureFixture) -> None:
    keep_bookmark(run.store, PREFIX, Bookmark(instance=run.read().instance, position=(1, 9)))
    key = f"{PREFIX}bookmarks/{run.read().instance}.json"
    run.store.put(key, run.store.get(key).replace(b"9", b"8"))
    assert find_bookmark(run.store, run.read(), told_step=5).position == START
    assert "damaged: the events of run k are read from their start" in caplog.text


def test_store_that_goes_away_between_two_chunks_costs_no_event(
    run: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(run, random.Random(2))
    while writer.write():
        pass
    follower, get = Follower(run, generation=0, num_steps=1), MemoryStore.get

    def fail_at_the_second(self: MemoryStore, key: str) -> bytes:
        if key == chunk_key(PREFIX, 1, 1):
            raise InfrastructureError("away")
        return get(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryStore, "get", fail_at_the_second)
        with pytest.raises(InfrastructureError):
            follower.look()
    _, events = follower.look()
    assert {event.step for event in events if event.kind == "step"} == set(range(1, writer.num_steps + 1))


def test_bookmark_with_an_event_that_is_none_is_not_believed(run: RunRecord) -> None:
    bad = Event(kind="attempt", time=1.0, token=1, step=0, values={"source": "start"})
    keep_bookmark(run.store, PREFIX, Bookmark(instance=run.read().instance, position=(1, 1), events=(bad,)))
    assert find_bookmark(run.store, run.read(), told_step=9).events == ()
