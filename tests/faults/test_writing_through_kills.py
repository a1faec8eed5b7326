"""A writer killed at one request after another, and run again: nothing finished is sent twice, the digest is clean."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.faults.evidence import write_evidence
from tests.faults.proxy import LosingProxy
from tests.unit.data_source import data_config, local_source, write_files
from tests.unit.tiny import Tiny
from training.data.writer import write_dataset
from training.s3.objectstore import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path, num_files=4)
    return tmp_path


class Killer:
    """Watches a proxy: kills the writer at a request, before or after it is applied, and counts what is applied."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._victim: subprocess.Popen[str] | None = None
        self._left = 0
        self._after = False
        self.applied: Counter[str] = Counter()
        self.num_killed = 0

    def arm(self, victim: subprocess.Popen[str], *, at_request: int, after: bool) -> None:
        with self._lock:
            self._victim, self._left, self._after = victim, at_request, after

    def watch(self, method: str, path: str, status: int) -> None:
        with self._lock:
            if status == 200 and method == "PUT" and "/shards/" in path:
                self.applied[path] += 1
            if self._victim is None or (status != 0) is not self._after:
                return
            self._left -= 1
            if self._left == 0:
                self._victim.kill()
                self._victim.wait()
                self._victim = None
                self.num_killed += 1


def write_through_kills(store: Store, folder: Path, chance: random.Random) -> dict[str, Any]:
    """Run the writer until one comes through; each before it is killed at a random request."""
    config = data_config()
    clean = Store(replace(store.location, prefix=store.location.prefix + f"clean-{chance.random()}/"))
    digest = write_dataset(clean, local_source(folder, config), config, Tiny()).manifest.digest
    killer = Killer()
    num_runs = 0
    with LosingProxy(str(store.location.endpoint)) as proxy:
        proxy.watch = killer.watch
        location = replace(store.location, endpoint=proxy.endpoint, prefix=f"{store.location.prefix}{chance.random()}/")
        command = [sys.executable, "-m", "tests.faults.writing_once", json.dumps(asdict(location)), str(folder)]
        while True:
            num_runs += 1
            writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            killer.arm(writer, at_request=chance.randint(1, 12 * num_runs), after=chance.random() < 0.5)
            output, _ = writer.communicate(timeout=240)
            if writer.returncode == 0:
                break
            assert writer.returncode == -9
    assert killer.num_killed == num_runs - 1 > 0
    assert output.strip() == digest
    assert set(killer.applied.values()) == {1}, "a finished shard was sent again"
    return {"num_killed": killer.num_killed, "num_shards": len(killer.applied), "digest": digest}


def test_killed_writer_sends_nothing_twice(store: Store, folder: Path) -> None:
    assert write_through_kills(store, folder, random.Random(1))["num_killed"] > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_writer_killed_at_many_points(store: Store, folder: Path) -> None:
    rows = [{"seed": seed, **write_through_kills(store, folder, random.Random(seed))} for seed in range(10)]
    assert sum(row["num_killed"] for row in rows) >= 20
    write_evidence("writing-through-kills", rows=rows)


def test_two_writers_at_once_end_with_one_dataset(store: Store, folder: Path) -> None:
    config = data_config()

    def write(_: int) -> str:
        other = Store(store.location)
        return write_dataset(other, local_source(folder, config), config, Tiny()).manifest.digest

    with ThreadPoolExecutor(3) as pool:
        digests = set(pool.map(write, range(3)))
    assert len(digests) == 1
    assert [key for key, _ in store.list_keys("datasets/tiny/manifests/")] == [
        f"datasets/tiny/manifests/{digests.pop()}.json"
    ]
