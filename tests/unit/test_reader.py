"""Reading: the right sample for every index, within bounds of memory and disk, and never damaged data."""

from __future__ import annotations

import errno
import io
import pickle
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.fakes import CountingStore
from tests.unit.reading import make_reader
from tests.unit.tiny import Tiny
from training.data import cache as cache_module
from training.data.cache import ShardCache, fetch_from
from training.data.manifest import FieldInfo, Manifest, ShardInfo, shard_key
from training.data.reader import Reader, sample_random
from training.data.shard import Ragged, encode_shard
from training.data.writer import write_dataset
from training.documents import fast_digest, sha256_hex
from training.errors import DamagedError, DeterministicError, UserError
from training.recipe import Sample
from training.s3.objectstore import Store


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    write_csv(tmp_path / "raw/0.csv", range(150))
    config = data_config()
    written = write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest
    assert len(written.splits["train"]) >= 4
    return written


def test_any_order_of_indices_gives_the_samples_asked_for(store: Store, manifest: Manifest) -> None:
    reader = make_reader(store, "tiny", manifest, "train")
    whole = reader.read(range(len(reader)))
    assert len(set(whole.ids)) == len(reader) == manifest.num_samples("train")
    indices = [len(reader) - 1, 0, 17, 17, len(reader) // 2]
    found = reader.read(indices)
    assert list(found.ids) == [whole.ids[index] for index in indices]
    assert found.fields["x"].tobytes() == whole.fields["x"][indices].tobytes()
    assert found.fields["x"].shape == (5, 5)


def test_ids_are_decoded_when_somebody_looks_and_travel_as_a_list(store: Store, manifest: Manifest) -> None:
    ids = make_reader(store, "tiny", manifest, "train").read([5, 60, 7]).ids
    assert len(ids) == 3
    assert [ids[0], ids[1], ids[2]] == list(ids)
    assert list(ids[1:]) == list(ids)[1:]
    assert pickle.loads(pickle.dumps(ids)) == list(ids)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_reading_all_gives_each_sample_once_in_order(store: Store, manifest: Manifest, batch_size: int) -> None:
    reader = make_reader(store, "tiny", manifest, "train")
    batches = list(reader.read_all(batch_size=batch_size))
    whole = reader.read(range(len(reader)))
    assert [sample_id for rows in batches for sample_id in rows.ids] == list(whole.ids)
    assert np.array_equal(np.concatenate([rows.fields["x"] for rows in batches]), whole.fields["x"])
    assert sum(len(rows.ids) for rows in reader.read_all(batch_size=4, num_samples=10)) == 10


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_index_beyond_the_ends_is_an_error(store: Store, manifest: Manifest, index: int) -> None:
    with pytest.raises(IndexError, match="numbered from 0"):
        make_reader(store, "tiny", manifest, "train").read([index])


# ---- decoding --------------------------------------------------------------------------------------------------------


def reader_of(columns: dict[str, np.ndarray | Ragged], maybe_decode: object = None) -> Reader:  # type: ignore[type-arg]
    """Of one shard in memory."""
    data = encode_shard([f"id{row}" for row in range(len(next(iter(columns.values()))))], columns)
    count = len(next(iter(columns.values())))
    info = ShardInfo(sha256=sha256_hex(data), xxh3=fast_digest(data), num_samples=count, num_bytes=len(data))
    fields = {
        name: FieldInfo(dtype="int16", shape=(None,) if isinstance(column, Ragged) else column.shape[1:])
        for name, column in columns.items()
    }
    return Reader(ShardCache(lambda _: data, [info]), [count], fields, maybe_decode=maybe_decode, seed=3)  # type: ignore[arg-type]


TEXT = Ragged.stack([np.arange(length, dtype=np.int16) for length in (3, 0, 5, 1)])


def test_rows_of_different_length_need_a_decode() -> None:
    with pytest.raises(UserError, match=r"field 'text' has rows of different length.*needs a decode\(\)"):
        reader_of({"text": TEXT})


def test_decode_sees_each_sample_with_its_own_random_stream() -> None:
    """The same whoever reads it and with whom, another in another epoch, and none where nothing is left to chance."""

    def decode(sample: Sample, random: np.random.Generator | None) -> Sample:
        return {"length": np.int64(len(sample["text"])), "noise": np.float64(random.random() if random else 0)}

    reader = reader_of({"text": TEXT}, decode)
    first = np.zeros(4, dtype=np.int64)
    rows = reader.read([2, 0, 3], maybe_epochs=first[:3])
    assert rows.fields["length"].tolist() == [5, 3, 1]
    assert rows.fields["noise"][1] == reader.read([0], maybe_epochs=first[:1]).fields["noise"][0]
    assert len({*rows.fields["noise"].tolist(), *reader.read([0], maybe_epochs=first[:1] + 1).fields["noise"]}) == 4
    assert reader.read([0, 1]).fields["noise"].tolist() == [0, 0]


@pytest.mark.parametrize("draw", [np.random.rand, torch.rand, random.random], ids=["numpy", "torch", "python"])
def test_decode_that_draws_from_a_global_generator_is_refused(draw: Callable[..., object]) -> None:
    """Threads share it: each run would read other samples."""

    def decode(sample: Sample, random: np.random.Generator | None) -> Sample:
        draw() if draw is not torch.rand else draw(1)
        return {"length": np.int64(len(sample["text"]))}

    first = np.zeros(1, dtype=np.int64)
    with pytest.raises(DeterministicError, match="draws from a global random generator"):
        reader_of({"text": TEXT}, decode).decoded_bytes(first, first)
    pure = reader_of({"text": TEXT}, lambda sample, random: {"length": np.int64(len(sample["text"]))})
    assert pure.decoded_bytes(first, first) == 8


def test_decode_that_gives_different_shapes_is_named() -> None:
    with pytest.raises(UserError, match=r"sample id1: the recipe's decode\(\) gave"):
        reader_of({"text": TEXT}, lambda sample, random: sample).read([0, 1])


def test_random_streams_are_golden() -> None:
    """Every augmented training relies on them."""
    found = [
        int(sample_random(*place).integers(1 << 30)) for place in ((0, 0, 0), (7, 1, 10**9), (2**63 - 1, 2**24, 5))
    ]
    assert found == [37303846, 881450503, 819573483]


# ---- bounds ----------------------------------------------------------------------------------------------------------


def test_each_shard_is_fetched_once_when_all_fit(store: Store, manifest: Manifest) -> None:
    counting = CountingStore(store)
    reader = make_reader(counting, "tiny", manifest, "train")
    for _ in range(2):
        reader.read(range(len(reader)))
    assert sorted(counting.fetched) == sorted(shard_key("tiny", s.sha256) for s in manifest.splits["train"])
    assert reader.cache.num_bytes_fetched == sum(shard.num_bytes for shard in manifest.splits["train"])


def test_a_shard_that_many_want_at_once_is_fetched_once(store: Store, manifest: Manifest) -> None:
    counting, together = CountingStore(store), threading.Barrier(8)
    cache = make_reader(counting, "tiny", manifest, "train").cache

    def want() -> None:
        together.wait()
        cache.get(0)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counting.fetched) == 1


def test_too_many_open_files_only_mean_another_fetch(
    store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_refused = 0

    def refuse() -> io.FileIO:
        nonlocal num_refused
        num_refused += 1
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cache_module, "_unnamed_file", refuse)
    assert fetches(store, manifest, disk_bytes=1 << 20) == [0, 1, 2, 1, 2]
    assert num_refused > 0


def fetches(store: Store, manifest: Manifest, *, disk_bytes: int) -> list[int]:
    """Which shards are fetched in a fixed sequence of uses, with memory for two."""
    shards = manifest.splits["train"]
    counting = CountingStore(store)
    bound = 2 * max(shard.num_bytes for shard in shards)
    assert sum(shard.num_bytes for shard in shards[:3]) > bound
    cache = make_reader(counting, "tiny", manifest, "train", memory_bytes=bound, disk_bytes=disk_bytes).cache
    for number in (0, 1, 0, 2, 0, 1, 2):  # 2 pushes 1 out, since 0 was used after it
        assert len(cache.get(number)) == shards[number].num_samples
        assert cache._resident_bytes <= bound
    numbers = {shard_key("tiny", shard.sha256): number for number, shard in enumerate(shards)}
    return [numbers[key] for key in counting.fetched]


def test_memory_keeps_to_its_bound_and_drops_the_longest_unused(store: Store, manifest: Manifest) -> None:
    assert fetches(store, manifest, disk_bytes=0) == [0, 1, 2, 1, 2]


def test_what_does_not_fit_into_memory_is_kept_on_disk(store: Store, manifest: Manifest) -> None:
    assert fetches(store, manifest, disk_bytes=1 << 20) == [0, 1, 2]


def test_disk_keeps_to_its_bound(store: Store, manifest: Manifest) -> None:
    one = max(shard.num_bytes for shard in manifest.splits["train"])
    reader = make_reader(store, "tiny", manifest, "train", memory_bytes=1, disk_bytes=2 * one)
    for number in (0, 1, 2, 3, 1, 0):
        reader.cache.get(number)
        assert reader.cache._disk._num_bytes <= 2 * one


def test_full_disk_only_means_fetching_again(store: Store, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_all", full)
    assert fetches(store, manifest, disk_bytes=1 << 20) == [0, 1, 2, 1, 2]


def test_files_on_disk_have_no_name(
    store: Store, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing is left behind, however the process ends."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    reader = make_reader(store, "tiny", manifest, "train", memory_bytes=1, disk_bytes=1 << 20)
    reader.read(range(len(reader)))
    assert len(reader.cache._disk._files) >= 3
    assert list((tmp_path / "cache").iterdir()) == []
    reader.close()


def test_a_shard_larger_than_the_cache_can_be_read(store: Store, manifest: Manifest) -> None:
    reader = make_reader(store, "tiny", manifest, "train", memory_bytes=1)
    assert len(reader.read(range(len(reader))).ids) == len(reader)
    assert len(reader.cache._resident) == 1


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "first byte": lambda good, other: flip(good, 0),
    "last byte": lambda good, other: flip(good, len(good) - 1),
    "truncated": lambda good, other: good[:-1],
    "longer": lambda good, other: good + b"\0",
    "empty": lambda good, other: b"",
    "swapped with another": lambda good, other: other,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_an_error_that_names_it(store: Store, manifest: Manifest, damage: str) -> None:
    victim, other = manifest.splits["train"][1], manifest.splits["train"][2]
    key = shard_key("tiny", victim.sha256)
    store.put(key, DAMAGES[damage](store.get(key), store.get(shard_key("tiny", other.sha256))))
    reader = make_reader(store, "tiny", manifest, "train")
    reader.read([0])
    with pytest.raises(DamagedError, match=rf"{victim.sha256} is damaged on the store\. Start the pipeline again"):
        reader.read(range(len(reader)))


def test_a_byte_flipped_anywhere_is_noticed(store: Store, manifest: Manifest) -> None:
    """Each position of a small shard, and 200 of a large one; the length and xxh3-128 are the whole check."""
    info = manifest.splits["train"][1]
    small = store.get(shard_key("tiny", info.sha256))
    random = np.random.default_rng(5)
    large = encode_shard([f"{row}" for row in range(500)], {"x": random.integers(0, 255, (500, 4096), dtype=np.uint8)})
    for good, positions in ((small, range(len(small))), (large, random.integers(0, len(large), 200).tolist())):
        info = ShardInfo(sha256=sha256_hex(good), xxh3=fast_digest(good), num_samples=1, num_bytes=len(good))
        assert cache_module._is_whole(good, info)
        assert not any(cache_module._is_whole(flip(good, position), info) for position in positions)


def test_a_copy_damaged_on_its_way_is_fetched_once_more(store: Store, manifest: Manifest) -> None:
    fetch, info = fetch_from(store, "tiny"), manifest.splits["train"][0]
    replies = [flip(bytes(fetch(info)), 9), fetch(info)]
    cache = ShardCache(lambda _: replies.pop(0), [info])
    assert len(cache.get(0)) == info.num_samples
    assert replies == []


def test_a_stale_copy_on_disk_is_fetched_again(store: Store, manifest: Manifest) -> None:
    counting = CountingStore(store)
    reader = make_reader(counting, "tiny", manifest, "train", memory_bytes=1, disk_bytes=1 << 20)
    good = reader.read([0])
    reader.cache.get(1)
    file = reader.cache._disk._files[0]
    file.seek(manifest.splits["train"][0].num_bytes // 2)
    file.write(b"\xff\x00\xff")
    assert reader.read([0]).fields["x"].tobytes() == good.fields["x"].tobytes()
    assert len(counting.fetched) == 3


def test_a_missing_shard_is_an_error_that_names_it(store: Store, manifest: Manifest) -> None:
    victim = manifest.splits["test"][0]
    store.delete(shard_key("tiny", victim.sha256))
    with pytest.raises(DamagedError, match=rf"{victim.sha256} is missing.*Start the pipeline again"):
        make_reader(store, "tiny", manifest, "test").read([0])
