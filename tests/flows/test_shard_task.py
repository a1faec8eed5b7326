"""What the shard stage takes for the same work."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tasks.shard
from infra.launcher import JobSpec, JobState, JobStatus
from tasks.shard import shard, shard_cache_key
from tasks.shard_nodes import write_on_nodes
from tests.conftest import Stack
from tests.unit.data_source import data_config, write_csv
from training.config import Preset, TrainConfig
from training.data.activity import distrust, read_activity
from training.data.collect import collect
from training.data.versions import remove_version, versions
from training.data.withdraw import withdraw
from training.data.writer import PartResult, Writer


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    """It reads a folder with one file, into a dataset of its own."""
    write_csv(tmp_path / "raw/0.csv", range(100))
    return Preset(
        name="tiny",
        recipe="tests.unit.tiny:Tiny",
        data=data_config(name=f"d{uuid.uuid4().hex[:12]}"),
        train=TrainConfig(steps=1, batch_size=8),
        folder=str(tmp_path),
    )


def test_what_was_removed_withdrawn_or_damaged_is_not_taken_for_finished(stack: Stack, preset: Preset) -> None:
    name = preset.data.name

    def key() -> str:
        return shard_cache_key(None, {"preset": preset})

    fresh = key()
    digest = shard.fn(preset).digest
    assert key() == fresh, "sharding alone changes nothing"
    distrust(stack.store, name)
    damaged = key()
    withdraw(stack.store, name, digest, ["0.csv:5"])
    withdrawn = key()
    remove_version(stack.store, name, digest)
    assert digest not in versions(stack.store, name)
    assert len({fresh, damaged, withdrawn, key()}) == 4


class TwoOwners:
    """An engine whose job another one owns, too; who follows it is told to stop."""

    def __init__(self, *, status: JobStatus | None = None) -> None:
        self._status = status

    def submit(self, spec: JobSpec) -> None:
        assert spec.owner == "me"

    def find(self, key: str) -> JobStatus:
        if self._status is None:
            raise KeyboardInterrupt
        return self._status

    def logs(self, key: str) -> Sequence[Path]:
        return []

    def cancel(self, key: str, *, by: set[str] | None = None) -> bool:
        return by is None


def test_nodes_that_others_want_too_shard_on_without_one_of_their_owners(stack: Stack, preset: Preset) -> None:
    preset = replace(preset, launch=replace(preset.launch, shard_nodes=1))
    left: list[int] = []
    for status in (None, JobStatus(state=JobState.ENDED, nodes={})):
        engine: Any = TwoOwners(status=status)
        with pytest.raises(KeyboardInterrupt) if status is None else nullcontext():
            write_on_nodes(engine, stack.store, preset, owner="me")
        left.append(len(list(stack.store.list_keys(f"datasets/{preset.data.name}/sharing/"))))
    assert left == [1, 0], "what its nodes read is there as long as they are"


def test_source_that_is_as_it_was_is_not_read(stack: Stack, preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    def newest() -> str:
        return read_activity(stack.store, preset.data.name).newest

    first = shard.fn(preset)
    more = Path(preset.folder) / "raw/1.csv"
    write_csv(more, range(100, 150))
    second = shard.fn(preset)
    assert second.num_train_samples > first.num_train_samples
    assert newest() == second.digest

    monkeypatch.setattr(tasks.shard, "Writer", None)
    assert shard.fn(preset) == second
    more.unlink()
    assert shard.fn(preset) == first
    assert newest() == first.digest, "the version that was sharded last"


def test_result_is_kept_under_the_writers_claim_and_collected_with_its_version(
    stack: Stack, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody who collects garbage can take a result that is just being kept for one of a version that is gone."""
    name, seen = preset.data.name, list[str]()
    keep_result = tasks.shard.keep_result

    def look_and_keep(*arguments: Any) -> None:
        seen.extend(read_activity(stack.store, name).holders)
        keep_result(*arguments)

    monkeypatch.setattr(tasks.shard, "keep_result", look_and_keep)
    made = shard.fn(preset)
    assert [holder.partition("-")[0] for holder in seen] == ["writer"]
    assert collect(stack.store, name, older_than_hours=0).keys == ()
    (kept,) = [key for key, _ in stack.store.list_keys(f"datasets/{name}/results/")]
    remove_version(stack.store, name, made.digest)
    assert kept in collect(stack.store, name, older_than_hours=0).keys
    assert shard.fn(preset) == made


def test_result_of_a_source_that_changed_meanwhile_is_not_kept(
    stack: Stack, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts = tasks.shard.write_parts

    def change_and_write(writer: Writer) -> Sequence[PartResult]:
        write_csv(Path(preset.folder) / "raw/1.csv", range(100, 150))
        return write_parts(writer)

    monkeypatch.setattr(tasks.shard, "write_parts", change_and_write)
    shard.fn(preset)
    assert not list(stack.store.list_keys(f"datasets/{preset.data.name}/results/"))
