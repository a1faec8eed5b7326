"""What is read of the runs that an engine works on, and of those that it has no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from flows.monitor import runs as monitor_runs
from flows.monitor.runs import MAX_ASKED, Runs
from infra.launcher import JobState, JobStatus
from infra.settings import Settings
from tests.unit.fakes import MemoryStore
from tests.unit.tiny import tiny_preset
from training.errors import InfrastructureError, MissingError, UserError
from training.runs.events import Event, EventReader, chunk_key
from training.runs.goodput import account
from training.runs.job import Job, store_job
from training.runs.record import CheckpointRef, Failure, Record, Result, RunRecord, without_failure
from training.s3.objectstore import Entry

SETTINGS = Settings(
    home=Path("/nowhere"), s3_endpoint=None, s3_bucket="b", s3_prefix="", s3_region="r",
    maybe_mlflow_uri="http://mlflow", maybe_prefect_api_url="http://prefect/api", s3_is_local=False,
)  # fmt: skip
FLOW_RUN = "5b3b5dc3-cbb5-4fb6-a6ba-5f14fa71b912"
KEY = "k" * 64


class ListedStore(MemoryStore):
    """Its objects can be listed, too."""

    def list_entries(self, prefix: str) -> Iterator[Entry]:
        for key, data in sorted(self.objects.items()):
            if key.startswith(prefix):
                yield Entry(key=key, num_bytes=len(data), etag=str(hash(data)), modified=cast(Any, None))

    def put_immutable(self, key: str, data: bytes | bytearray, **options: Any) -> Any:
        self.put(key, data)

    def get_proven(self, key: str, *, sha256: str) -> bytes:
        return self.get(key)


class Engine:
    """Has the jobs that a test gives it."""

    def __init__(self) -> None:
        self.owners: dict[str, Sequence[str]] = {}

    def jobs(self) -> Mapping[str, Sequence[str]]:
        return self.owners

    def find(self, key: str) -> JobStatus | None:
        return JobStatus(state=JobState.RUNNING, nodes={"node0": "RUNNING"})


class Watching:
    """A run, an engine that has it, and who watches both."""

    def __init__(self) -> None:
        self.store = ListedStore({})
        self.engine = Engine()
        self.runs = Runs(SETTINGS, self.store, cast(Any, self.engine))
        self._chunks: dict[int, int] = {}

    def begin(self, key: str = KEY) -> RunRecord:
        self.engine.owners[key] = [FLOW_RUN]
        preset = tiny_preset()
        location = self.store.location
        store_job(self.store, Job(key=key, generation=0, preset=preset, dataset_digest="d", location=location))
        run = RunRecord(self.store, key)
        run.create_if_missing()
        return run

    def tell(self, token: int, *events: Event) -> None:
        number = self._chunks[token] = self._chunks.get(token, -1) + 1
        data = b"".join(event.to_line() for event in events)
        self.store.put(chunk_key(f"runs/{KEY}/0/", token, number), data)


def attempt(token: int, *, at: float, step: int = 0, source: str = "start") -> Event:
    return Event(kind="attempt", time=at, token=token, step=step, values={"world_size": 1, "source": source})


def steps(first: int, last: int, *, token: int, start: float) -> list[Event]:
    numbers = dict.fromkeys(("loss", "grad_norm", "learning_rate", "samples_per_second", "seconds"), 1.0)
    values = {**numbers, "validation": {}}
    return [
        Event(kind="step", time=start + number - first + 1, token=token, step=number, values=values)
        for number in range(first, last + 1)
    ]


def begun(record: Record) -> Record:
    return replace(record, token=1, num_nodes=1, resume_steps=(0,))


def test_a_run_that_goes_back_behind_what_was_settled_is_read_anew() -> None:
    watching = Watching()
    run = watching.begin()
    run.update(begun)
    watching.tell(1, attempt(1, at=0.0), *steps(1, 6, token=1, start=0.0))
    run.update(lambda record: replace(record, checkpoints=(CheckpointRef(step=4, token=1, sha256="c"),)))
    assert watching.runs.look()[KEY].seconds["productive"] == 6.0
    run.update(lambda record: replace(record, token=2, resume_steps=(0, 2), checkpoints=()))  # it was damaged
    watching.tell(2, attempt(2, at=8.0, step=2, source="checkpoint"), *steps(3, 3, token=2, start=8.0))
    found = watching.runs.look()[KEY]
    whole = account(EventReader(watching.store, f"runs/{KEY}/0/").read_new(newest_token=2), [0, 2])
    assert found.seconds == whole.seconds
    assert (found.seconds["productive"], found.seconds["redone"], found.step) == (3.0, 4.0, 3)


def test_the_end_of_a_run_is_read_though_the_engine_has_it_no_more() -> None:
    watching = Watching()
    run = watching.begin()
    run.update(begun)
    watching.tell(1, attempt(1, at=0.0), *steps(1, 2, token=1, start=0.0))
    assert watching.runs.look()[KEY].step == 2
    watching.engine.owners.clear()
    watching.tell(1, *steps(3, 5, token=1, start=2.0))
    last = CheckpointRef(step=5, token=1, sha256="c")
    result = Result(step=5, weights_sha256="w", state_sha256="s", checkpoint=last)
    run.update(lambda record: replace(record, result=result))
    found = watching.runs.look()[KEY]
    assert (found.state, found.step, found.seconds["productive"]) == ("finished", 5, 5.0)
    assert [point.step for point in found.curve] == [1, 2, 3, 4, 5]
    assert found.links["Prefect"] == f"http://prefect/runs/flow-run/{FLOW_RUN}"
    assert watching.runs.targets() == []


def test_a_run_is_forgotten_when_it_is_long_over_or_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    watching = Watching()
    run = watching.begin()
    assert list(watching.runs.look()) == [KEY]
    watching.store.objects.pop(run.object_key)
    assert watching.runs.look() == {}, "it was removed"
    watching.begin()
    assert list(watching.runs.look()) == [KEY]
    watching.engine.owners.clear()
    watching.runs.look()
    monkeypatch.setattr(monitor_runs, "KEPT_SECONDS", 0.0)
    assert watching.runs.look() == {}


def test_a_run_that_failed_and_is_started_again_is_seen_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_runs, "LAST_WORDS_SECONDS", 0.0)
    watching = Watching()
    run = watching.begin()
    failure = Failure(kind="DeterministicError", message="step 3: the loss is nan")
    run.update(lambda record: replace(begun(record), failure=failure))
    assert watching.runs.look()[KEY].state == "failed"
    run.update(without_failure)
    assert watching.runs.look()[KEY].state != "failed"


def test_a_damaged_run_hides_no_other() -> None:
    watching = Watching()
    watching.begin()
    other = watching.begin("o" * 64)
    watching.store.put(other.object_key, b'{"format": 1, "key": 3}')
    assert list(watching.runs.look()) == [KEY]


def test_a_run_that_nobody_watches_is_read_when_it_is_asked_for() -> None:
    watching = Watching()
    keys = [f"{number:064}" for number in range(MAX_ASKED + 2)]
    for key in keys:
        watching.begin(key)
    watching.engine.owners.clear()
    assert {watching.runs.find(key).state for key in keys} == {"stopped"}
    assert len(watching.runs._asked) == MAX_ASKED
    assert watching.runs.look() == {}
    with pytest.raises(UserError, match="no run"):
        watching.runs.find("x" * 64)
    RunRecord(watching.store, "y" * 64).create_if_missing()
    with pytest.raises(MissingError, match="never given to an engine"):
        watching.runs.find("y" * 64)


def test_a_run_is_asked_for_by_the_beginning_of_its_key() -> None:
    watching = Watching()
    for key in (KEY, "k" * 63 + "o"):
        watching.begin(key)
    watching.runs.look()
    assert watching.runs.find("k" * 63 + "o").key == "k" * 63 + "o"
    with pytest.raises(UserError, match="2 runs"):
        watching.runs.find("k" * 63)


def test_a_watched_run_is_shown_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise InfrastructureError("the store is away")

    watching = Watching()
    watching.begin()
    watching.runs.look()
    for name in ("get", "list_folders"):
        monkeypatch.setattr(watching.store, name, away)
    assert watching.runs.find(KEY).key == KEY
    with pytest.raises(InfrastructureError, match="away"):
        watching.runs.find(KEY[:12])


def test_a_run_that_is_asked_for_before_the_first_look_is_at_work() -> None:
    watching = Watching()
    watching.begin()
    found = watching.runs.find(KEY)
    assert (found.state, found.links["Prefect"]) == ("starting", f"http://prefect/runs/flow-run/{FLOW_RUN}")
