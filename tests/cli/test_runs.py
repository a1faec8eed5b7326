"""`unbroken runs` on keys that name no run, or several; and removing one run, which is not to touch another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from infra.launcher import JobSpec
from infra.local.launcher import LocalLauncher
from tasks.tracking import METRICS
from tests.cli.commands import complaint, unbroken
from tests.conftest import UNBROKEN, Stack
from training.documents import sha256_hex
from training.runs.events import Event, chunk_key
from training.runs.record import Departure, RunRecord
from training.s3.objectstore import Store, StoreLocation


@dataclass(frozen=True, kw_only=True)
class Corner:
    """A prefix of the test's own, with runs in it."""

    stack: Stack
    prefix: str

    @property
    def store(self) -> Store:
        where = self.stack.location
        return Store(StoreLocation(endpoint=where.endpoint, bucket=where.bucket, prefix=f"{self.prefix}/"))

    def add_run(self, key: str) -> RunRecord:
        run = RunRecord(self.store, key)
        run.create_if_missing()
        self.store.put(f"runs/{key}/events/1/1.jsonl", b"{}\n")
        return run

    def num_objects(self) -> int:
        return sum(1 for _ in self.store.list_keys("runs/"))


@pytest.fixture
def corner(stack: Stack) -> Corner:
    return Corner(stack=stack, prefix=f"tests/{uuid.uuid4().hex}")


@pytest.fixture
def at_work(stack: Stack) -> Iterator[str]:
    """The key of a job that the engine has."""
    key = f"aa{uuid.uuid4().hex}"
    launcher = LocalLauncher(stack.home)
    launcher.submit(JobSpec(key=key, num_nodes=1, command=("/bin/sleep", "86400"), environment={}))
    yield key
    launcher.cancel(key)


@pytest.mark.parametrize(
    ("verb", "key", "found"),
    [("cancel", "bb", "no run"), ("rm", "bb", "no run"), ("logs", "aa", "2 runs"), ("rm", "aa", "2 runs")],
)
def test_unknown_and_ambiguous_keys_are_refused(corner: Corner, verb: str, key: str, found: str) -> None:
    corner.add_run("aa11")
    corner.add_run("aa22")
    assert f"{found} with a key that begins with '{key}'" in _refused(corner, verb, key)
    assert corner.num_objects() == 4


def test_empty_key_is_refused_even_if_there_is_just_one_run(corner: Corner) -> None:
    """As from a script whose variable was never set."""
    corner.add_run("aa11")
    assert "key" in _refused(corner, "rm", "")
    assert corner.num_objects() == 2


def test_a_damaged_record_hides_no_other_run(corner: Corner) -> None:
    corner.add_run("aa11")
    damaged = corner.add_run("bb22")
    corner.store.put(damaged.object_key, b"{}")
    listed = unbroken(corner.stack, "runs", "ls", "--json", variables={"UNBROKEN_S3_PREFIX": corner.prefix})
    assert {row["key"]: row["state"] for row in json.loads(listed.stdout)} == {"aa11": "open", "bb22": "damaged"}
    assert "run aa11 left no log" in _refused(corner, "logs", "aa")
    refused = unbroken(corner.stack, "runs", "logs", "bb", variables={"UNBROKEN_S3_PREFIX": corner.prefix})
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (6, refused.stderr.strip())
    assert "damaged" in refused.stderr


def test_run_without_logs_on_this_machine_says_so(corner: Corner) -> None:
    corner.add_run("aa11")
    assert "run aa11 left no log on this machine" in _refused(corner, "logs", "aa")


def test_a_run_is_shown_with_why_nodes_left_and_where_its_time_went(corner: Corner) -> None:
    run = corner.add_run("aa11")
    lost = Departure(token=1, node=1, cause="worker killed by signal 9", step=1, class_name="Killed")
    record = run.update(lambda record: replace(record, token=1, resume_steps=(0,), departures=(lost,)))
    lines = [
        Event(kind="attempt", time=10.0, token=1, step=0, values={"source": "start", "world_size": 1}),
        Event(kind="step", time=13.0, token=1, step=1, values={**dict.fromkeys(METRICS, 0.5), "seconds": 2.0}),
    ]
    corner.store.put(chunk_key(run.prefix(record), 1, 0), b"".join(line.to_line() for line in lines))
    shown = _unbroken(corner, "show", "aa")
    assert "worker killed by signal 9" in shown
    assert re.search(r"productive\s+2\.0\s+66\.7%", shown)
    found = json.loads(_unbroken(corner, "show", "aa", "--json"))
    assert (found["goodput"], found["seconds"]["waiting"]) == (pytest.approx(2 / 3), 1.0)


def test_a_report_is_written_and_written_over_and_nothing_else_is(corner: Corner, tmp_path: Path) -> None:
    for key in ("aa11", "bb22"):
        corner.add_run(key)
    path = tmp_path / "page.html"
    told = json.loads(_unbroken(corner, "aa", "--output", str(path), "--json", verb="report"))
    assert (told["file"], told["runs"], told["bytes"]) == (str(path), ["aa11"], path.stat().st_size)
    first = path.read_bytes()
    assert "not in it: " in _unbroken(corner, "aa", "--output", str(path), verb="report")
    assert path.read_bytes() == first
    assert sha256_hex(first) == told["sha256"]
    _unbroken(corner, "aa", "bb", "aa", "--output", str(path), verb="report")
    assert "2 runs compared" in path.read_text()
    other = tmp_path / "mine.html"
    other.write_text("<html>")
    for place, said in ((other, "exists, and is no report"), (tmp_path, "exists"), (tmp_path / "a/b", "in a folder")):
        assert said in _refused(corner, "aa", "--output", str(place), verb="report")
    assert other.read_text() == "<html>"
    assert "no run with a key that begins with 'cc'" in _refused(corner, "cc", verb="report")


def test_run_at_work_is_removed_only_once_it_is_cancelled(corner: Corner, at_work: str) -> None:
    corner.add_run(at_work)
    corner.add_run("ab11")
    line = _refused(corner, "rm", at_work)
    assert f"run {at_work[:12]} is at work: cancel it first with `unbroken runs cancel" in line
    assert corner.num_objects() == 4

    assert _unbroken(corner, "cancel", at_work) == f"run {at_work[:12]} has no process left\n"
    assert LocalLauncher(corner.stack.home).find(at_work) is None
    assert _unbroken(corner, "rm", at_work) == f"deleted 2 objects of run {at_work[:12]}\n"
    assert {key.split("/")[1] for key, _ in corner.store.list_keys("runs/")} == {"ab11"}


def _refused(corner: Corner, *arguments: str, verb: str = "runs") -> str:
    return complaint(unbroken(corner.stack, verb, *arguments, variables={"UNBROKEN_S3_PREFIX": corner.prefix}))


def _unbroken(corner: Corner, *arguments: str, verb: str = "runs") -> str:
    done = unbroken(corner.stack, verb, *arguments, variables={"UNBROKEN_S3_PREFIX": corner.prefix})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whoever_reads_along_may_stop(stack: Stack) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # before a word is said
    with os.fdopen(writer, "wb") as nobody:
        command = [UNBROKEN, "runs", "ls", "--json"]
        done = subprocess.run(command, env=stack.environment(), stdout=nobody, stderr=nobody, timeout=120, check=False)
    assert done.returncode == 141
