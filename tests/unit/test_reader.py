"""Reading: the right sample for every index, within a bound of memory, and never damaged data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.fakes import CountingStore
from tests.unit.tiny import Tiny
from training.data.manifest import Manifest, shard_key
from training.data.reader import Reader
from training.data.writer import write_dataset
from training.errors import DamagedError
from training.objectstore import MissingError, Store


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    write_csv(tmp_path / "raw/0.csv", range(150))
    config = data_config()
    written = write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest
    assert len(written.splits["train"]) >= 4
    return written


def test_any_order_of_indices_gives_the_samples_asked_for(store: Store, manifest: Manifest) -> None:
    reader = Reader(store, "tiny", manifest, "train")
    in_order, fields = reader.read(range(len(reader)))
    assert len(set(in_order)) == len(reader) == manifest.num_samples("train")
    indices = [len(reader) - 1, 0, 17, 17, len(reader) // 2]
    ids, found = reader.read(indices)
    assert ids == [in_order[index] for index in indices]
    assert found["x"].tobytes() == fields["x"][indices].tobytes()
    assert found["x"].shape == (5, 5)


def test_an_index_beyond_the_end_is_an_error(store: Store, manifest: Manifest) -> None:
    reader = Reader(store, "tiny", manifest, "train")
    with pytest.raises(IndexError):
        reader.read([len(reader)])


def test_each_shard_is_fetched_once_when_all_fit(store: Store, manifest: Manifest) -> None:
    counting = CountingStore(store)
    reader = Reader(counting, "tiny", manifest, "train")
    for _ in range(2):
        reader.read(range(len(reader)))
    assert sorted(counting.fetched) == sorted(shard_key("tiny", s.sha256) for s in manifest.splits["train"])


def test_the_cache_keeps_to_its_bound_and_drops_the_longest_unused(store: Store, manifest: Manifest) -> None:
    shards = manifest.splits["train"]
    bound = 2 * max(shard.num_bytes for shard in shards)
    assert sum(shard.num_bytes for shard in shards[:3]) > bound
    counting = CountingStore(store)
    reader = Reader(counting, "tiny", manifest, "train", cache_bytes=bound)
    for number in (0, 1, 0, 2, 0, 1):  # 2 pushes 1 out, since 0 was used after it
        reader.read([sum(shard.num_samples for shard in shards[:number])])
        assert reader._cached_bytes() <= bound
    numbers = {shard_key("tiny", shard.sha256): number for number, shard in enumerate(shards)}
    assert [numbers[key] for key in counting.fetched] == [0, 1, 2, 1]


def test_a_shard_larger_than_the_cache_can_be_read(store: Store, manifest: Manifest) -> None:
    reader = Reader(store, "tiny", manifest, "train", cache_bytes=1)
    ids, _ = reader.read(range(len(reader)))
    assert len(ids) == len(reader)
    assert len(reader._cache) == 1


@pytest.mark.parametrize("place", ["first", "middle", "last", "cut", "longer"])
def test_a_damaged_shard_is_an_error_that_names_it(store: Store, manifest: Manifest, place: str) -> None:
    victim = manifest.splits["train"][1]
    key = shard_key("tiny", victim.sha256)
    good = store.get(key)
    if place in ("cut", "longer"):
        store.put(key, good[:-1] if place == "cut" else good + b"\0")
    else:
        position = {"first": 0, "middle": len(good) // 2, "last": len(good) - 1}[place]
        store.put(key, good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    reader = Reader(store, "tiny", manifest, "train")
    reader.read([0])
    with pytest.raises(DamagedError, match=rf"{victim.sha256} is damaged: run the shard stage again"):
        reader.read(range(len(reader)))


def test_a_missing_shard_is_an_error_that_names_it(store: Store, manifest: Manifest) -> None:
    victim = manifest.splits["test"][0]
    store.delete(shard_key("tiny", victim.sha256))
    with pytest.raises(MissingError, match=victim.sha256):
        Reader(store, "tiny", manifest, "test").read([0])
