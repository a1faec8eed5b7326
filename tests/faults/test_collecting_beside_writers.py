"""Garbage is collected while writers are at work, stopped or killed: every version that is named is whole, always."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.tiny import Tiny
from tests.waiting import wait_until
from training.data.collect import Garbage, collect
from training.data.lease import LEASE_SECONDS, BusyError
from training.data.manifest import SPLITS, load_manifest, shard_key
from training.data.shard import decode_shard
from training.data.versions import remove_version, verify_version, versions
from training.data.withdraw import withdraw
from training.data.withdrawn import record_of, withdrawn_records
from training.data.writer import write_dataset
from training.errors import InfrastructureError, UserError
from training.s3.objectstore import Store

CONFIG = data_config()
SHORT_SECONDS = 2.0
"""Of a claim that is to lapse."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        write_csv(tmp_path / f"raw/{number}.csv", range(number * 60, (number + 1) * 60))
    return tmp_path


def write(store: Store, folder: Path) -> str:
    source = local_source(folder, CONFIG)
    return write_dataset(store, source, CONFIG, Tiny(), withdrawn=withdrawn_records(store, "tiny")).manifest.digest


def shards(store: Store) -> set[str]:
    return {key for key, _ in store.list_keys("datasets/tiny/shards/")}


def try_to_collect(store: Store) -> Garbage | None:
    """None if a writer is at work, or another collector."""
    try:
        return collect(store, "tiny", older_than_hours=0)
    except BusyError:
        return None


def assert_whole(store: Store) -> None:
    for digest in versions(store, "tiny"):
        assert [damage for damage in verify_version(store, "tiny", digest) if damage] == []


@contextmanager
def writer_between_its_shards_and_its_manifest(
    store: Store, folder: Path, *, lease_seconds: float = LEASE_SECONDS
) -> Iterator[subprocess.Popen[str]]:
    location = json.dumps(asdict(store.location))
    command = [sys.executable, "-m", "tests.faults.writing_in_two_parts", location, str(folder), str(lease_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "sent\n"
        try:
            yield writer
        finally:
            writer.kill()


def test_a_stopped_writer_makes_again_what_was_collected(store: Store, folder: Path) -> None:
    with writer_between_its_shards_and_its_manifest(store, folder, lease_seconds=SHORT_SECONDS) as writer:
        sent = shards(store)
        os.kill(writer.pid, signal.SIGSTOP)
        garbage = wait_until(lambda: try_to_collect(store), what="the stopped writer's claim to lapse")
        assert sent <= set(garbage.keys)
        assert shards(store) == set(), "the fault fired"
        os.kill(writer.pid, signal.SIGCONT)
        output, _ = writer.communicate("go on\n", timeout=240)
    assert output.strip() == versions(store, "tiny")[0]
    assert shards(store) == sent
    assert_whole(store)


def test_a_killed_writer_blocks_until_its_claim_lapses_and_is_run_again(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer_between_its_shards_and_its_manifest(store, folder) as writer:
        sent = shards(store)
        assert try_to_collect(store) is None
        writer.kill()
        writer.wait()
        assert try_to_collect(store) is None
        with monkeypatch.context() as patch:
            late = {"time": lambda: time.time() + 2 * LEASE_SECONDS}
            patch.setattr("training.data.lease.time", SimpleNamespace(**{**vars(time), **late}))
            assert try_to_collect(store)
    assert shards(store) == set()
    assert write(store, folder) == versions(store, "tiny")[0]
    assert shards(store) == sent
    assert_whole(store)


def test_racing_collectors_delete_the_garbage_and_nothing_else(store: Store, folder: Path) -> None:
    write(store, folder)
    kept = shards(store)
    for number in range(20):
        store.put(f"datasets/tiny/shards/stray-{number:02}", b"left by a writer that died")
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda _: try_to_collect(store), range(8)))
    assert any(outcomes)
    assert max(len(garbage.keys) for garbage in outcomes if garbage) == 20
    assert shards(store) == kept


def test_a_collector_that_was_away_too_long_deletes_nothing_more(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it had been stopped after its first delete: a writer may have found the other shards since."""
    remove_version(store, "tiny", write(store, folder))
    monkeypatch.setattr("training.data.lease.Lease._renew_for_ever", lambda self: None)
    away = threading.Event()
    deleted: list[str] = []
    monkeypatch.setattr("training.data.lease._now", lambda: 1e6 if away.is_set() else 0.0)
    monkeypatch.setattr(Store, "delete_soon", lambda self, key: (deleted.append(key), away.set()))
    with pytest.raises(InfrastructureError, match="was away for so long"):
        collect(store, "tiny", older_than_hours=0)
    assert len(deleted) == 1


def test_every_version_is_whole_whatever_runs_at_once(store: Store, folder: Path) -> None:
    """Two workers do anything while a collector comes whenever it may, until it has five times found garbage, and a
    version was removed."""
    write(store, folder)
    done: Counter[str] = Counter()
    is_over = threading.Event()

    def work(number: int) -> None:
        chance = random.Random(number)
        source = folder / f"worker-{number}"
        for part in range(2):
            write_csv(source / f"raw/{part}.csv", range(60 * part, 60 * part + 60))
        try:
            while not is_over.is_set():
                for _ in range(chance.randint(1, 4)):
                    name, act = chance.choice(actions(store, source, chance))
                    try:
                        act()
                        done[name] += 1
                    except (
                        UserError,
                        InfrastructureError,
                    ):  # what it was about is gone, or withdrawn: none was promised
                        done[f"{name} refused"] += 1
                let_the_collector_in()
        finally:
            is_over.set()

    def let_the_collector_in() -> None:
        """It is let in only while nobody writes: two who never rest could keep it out for ever."""
        before = done["collected"]
        wait_until(lambda: done["collected"] > before or is_over.is_set(), what="the collector's turn")

    def tidy() -> None:
        try:
            while (done["found garbage"] < 5 or not {"write", "rm"} <= set(done)) and not is_over.is_set():
                garbage = try_to_collect(store)
                done["looked"] += 1
                if garbage is not None:
                    done["collected"] += 1
                if garbage is not None and garbage.keys:
                    assert_whole_but_for_removed(store)
                    done["found garbage"] += 1
                is_over.wait(0.01)
        finally:
            is_over.set()

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(tidy), *(pool.submit(work, number) for number in range(2))]:
            job.result()
    assert_whole(store)
    assert {"write", "rm", "found garbage"} <= set(done), done


def assert_whole_but_for_removed(store: Store) -> None:
    """A version may be removed, and collected, while it is looked at."""
    for digest in versions(store, "tiny"):
        try:
            damages = [damage for damage in verify_version(store, "tiny", digest) if damage]
        except UserError:
            continue
        assert not damages or digest not in versions(store, "tiny"), damages


def actions(store: Store, folder: Path, chance: random.Random) -> list[tuple[str, Callable[[], object]]]:
    def append_and_write() -> None:
        write_csv(folder / "raw/1.csv", range(chance.randrange(40, 90)))
        write(store, folder)

    def withdraw_one() -> None:
        newest = versions(store, "tiny")[-1]
        shard = load_manifest(store, "tiny", newest).splits["train"][0].sha256
        first = decode_shard(store.get(shard_key("tiny", shard)), name=shard).id_of(0)
        withdraw(store, "tiny", newest, [record_of(first)])

    return [
        ("write", lambda: write(store, folder)),
        ("write", append_and_write),
        ("rm", lambda: remove_version(store, "tiny", chance.choice(versions(store, "tiny") or ["none"]))),
        ("withdraw", withdraw_one),
    ]


def test_records_withdrawn_while_they_are_sharded_make_no_result(store: Store, folder: Path) -> None:
    first = write(store, folder)
    write_csv(folder / "raw/3.csv", range(900, 960))
    with writer_between_its_shards_and_its_manifest(store, folder) as writer:
        withdraw(store, "tiny", first, ["0.csv:5"])
        writer.communicate("go on\n", timeout=240)
    assert writer.returncode != 0
    again = load_manifest(store, "tiny", write(store, folder))
    ids = {
        sample_id
        for split in SPLITS
        for info in again.splits[split]
        for sample_id in decode_shard(store.get(shard_key("tiny", info.sha256)), name=info.sha256).ids
    }
    assert {"0.csv:4#0", "3.csv:5#0"} <= ids
    assert "0.csv:5#0" not in ids
