"""Streams: the microbatches of the order, from any step, by threads or by processes of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.shared_memory import names_mapped_by
from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.reading import make_reader
from tests.unit.tiny import Tiny, tiny_preset
from tests.waiting import wait_until
from training.arithmetic.reduce import owned_range
from training.cluster.worker import _class_name
from training.config import Preset
from training.data.loader import Feed
from training.data.manifest import Manifest, shard_key
from training.data.opening import open_order
from training.data.stream import Microbatch, Stream
from training.data.writer import write_dataset
from training.errors import DamagedError, DeterministicError, UnbrokenError, UserError
from training.recipe import Sample
from training.runs.failures import CRASHED, ReaderDiedError
from training.s3.objectstore import Store

STEPS = 12


@pytest.fixture
def preset() -> Preset:
    preset = tiny_preset(steps=STEPS, batch_size=24, virtual_workers=4, shuffle_window_shards=1)
    return replace(preset, data=data_config())


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    write_csv(tmp_path / "raw/0.csv", range(250))
    config = data_config()
    return write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest


def expected(
    store: Store, preset: Preset, manifest: Manifest, workers: range, step: int
) -> list[tuple[int, int, list[str]]]:
    order, reader = open_order(preset, manifest), make_reader(store, "tiny", manifest, "train")
    assert not order.is_whole
    return [
        (number, worker, list(reader.read(order.samples(worker, step=number)[0]).ids))
        for number in range(step, STEPS)
        for worker in workers
    ]


def places(batches: list[Microbatch]) -> list[tuple[int, int, list[str]]]:
    return [(batch.step, batch.worker, list(batch.ids)) for batch in batches]


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def feed_of(store: Store, preset: Preset, manifest: Manifest, data_workers: int) -> Feed:
    launch = replace(preset.launch, data_workers=data_workers)
    return Feed(preset=replace(preset, launch=launch), location=store.location, dataset_digest=manifest.digest)


@pytest.mark.parametrize(("workers", "step"), [(range(4), 0), (range(1, 3), 5), (range(3, 4), 11), (range(2), 12)])
def test_microbatches_come_in_order_from_any_step(
    store: Store, preset: Preset, manifest: Manifest, workers: range, step: int
) -> None:
    found = list(feed_of(store, preset, manifest, 0).microbatches(workers=workers, step=step))
    assert places(found) == expected(store, preset, manifest, workers, step)
    assert all(batch.fields["x"].shape == (6, 5) for batch in found)


@pytest.mark.parametrize("max_block_steps", [1, 3, 100])
def test_how_far_ahead_it_reads_changes_nothing(
    store: Store, preset: Preset, manifest: Manifest, max_block_steps: int
) -> None:
    reader, order = make_reader(store, "tiny", manifest, "train"), open_order(preset, manifest)
    stream = Stream(reader, order, workers=range(4), step=3, num_steps=STEPS, max_block_steps=max_block_steps)
    assert places(list(stream)) == expected(store, preset, manifest, range(4), 3)


def test_processes_give_the_same_and_end_with_the_stream(store: Store, preset: Preset, manifest: Manifest) -> None:
    """Three processes, among whom four virtual workers do not divide: one of them reads for two."""
    before = set(psutil.Process().children(recursive=True))
    microbatches = feed_of(store, preset, manifest, 3).microbatches(workers=range(4), step=2)
    first = list(islice(microbatches, 5))
    begun = set(psutil.Process().children(recursive=True)) - before
    readers = [process for process in begun if process.ppid() != os.getpid()]
    assert len(readers) == 3, "children of the fork server"
    assert places([*first, *microbatches]) == expected(store, preset, manifest, range(4), 2)
    _, alive = psutil.wait_procs(readers, timeout=120)
    assert alive == []


READ_AND_WAIT = """
import json, sys, psutil
from training.data.loader import Feed
from training.documents import parse

microbatches = parse(Feed, json.loads(sys.argv[1])).microbatches(workers=range(4), step=0)
next(microbatches)
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
sys.stdin.read()
"""


def test_killed_rank_leaves_no_process_and_no_shared_memory(store: Store, preset: Preset, manifest: Manifest) -> None:
    feed = feed_of(store, preset, manifest, 2)
    command = [sys.executable, "-c", READ_AND_WAIT, json.dumps(asdict(feed))]
    rank = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    children = json.loads(rank.stdout.readline())
    assert len(children) >= 3, "a fork server and two readers"
    shared = names_mapped_by([rank.pid, *children])
    assert shared, "as processes made by a fork server have"
    rank.kill()
    rank.communicate(timeout=240)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in children), what="its children to die")
    wait_until(lambda: not any(path.exists() for path in shared), what="nothing to be left in shared memory")


@pytest.mark.parametrize("data_workers", [0, 2])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "swapped", "missing"])
def test_damage_is_named_within_seconds_and_never_a_short_epoch(
    store: Store, preset: Preset, manifest: Manifest, data_workers: int, damage: str
) -> None:
    victim = manifest.splits["train"][3].sha256
    good = store.get(shard_key("tiny", victim))
    if damage == "missing":
        store.delete(shard_key("tiny", victim))
    else:
        other = store.get(shard_key("tiny", manifest.splits["train"][4].sha256))
        store.put(
            shard_key("tiny", victim), {"flipped": flip(good, 99), "truncated": good[:-1], "swapped": other}[damage]
        )
    kind, message = failure(feed_of(store, preset, manifest, data_workers))
    assert kind is DamagedError
    assert victim in message
    assert "\n" not in message, "a line, also from another process"


def failure(feed: Feed) -> tuple[type, str]:
    """The error, without its traceback: that would keep the reading processes until the garbage is collected."""
    try:
        deque(feed.microbatches(workers=range(4), step=0), maxlen=0)
    except UnbrokenError as error:
        return type(error), str(error)
    return type(None), "nothing was found"


@dataclass(frozen=True, kw_only=True)
class Refusing(Tiny):
    """Decodes nothing."""

    def decode(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        raise ValueError("bad picture")


def test_reading_draws_from_nobody_elses_generator(store: Store, preset: Preset, manifest: Manifest) -> None:
    """Or the dropout of whoever reads first would be another one."""
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = feed_of(store, preset, manifest, 2).microbatches(workers=range(2), step=0)
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("data_workers", [0, 2])
def test_other_errors_of_ours_come_as_they_are_from_another_process(
    store: Store, preset: Preset, manifest: Manifest, data_workers: int
) -> None:
    feed = feed_of(store, preset, manifest, data_workers)
    refusing = replace(feed, preset=replace(feed.preset, recipe="tests.unit.test_stream:Refusing"))
    gone = replace(feed, dataset_digest="0" * 64)
    for bad, kind, says in (
        (refusing, DeterministicError, r"sample .*: decode\(\) failed: ValueError: bad picture"),
        (gone, UserError, "dataset 'tiny' has no version 000000000000: run the shard stage again"),
    ):
        found, message = failure(bad)
        assert found is kind
        assert re.fullmatch(says, message)


def test_all_ranks_together_fetch_little_more_than_the_dataset(store: Store, preset: Preset, tmp_path: Path) -> None:
    """One epoch, on 1, 2 and 4 ranks: at most one more shard per virtual worker, since two neighbours may share one."""
    write_csv(tmp_path / "raw/0.csv", range(1800))
    config = data_config()
    manifest = write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest
    order = open_order(preset, manifest)
    num_steps = order.num_samples // order.batch_size
    for num_ranks in (1, 2, 4):
        num_fetched = 0
        for rank in range(num_ranks):
            workers = owned_range(rank, num_ranks, order.virtual_workers)
            reader = make_reader(store, "tiny", manifest, "train", memory_bytes=20 * 1024)
            deque(Stream(reader, order, workers=workers, step=0, num_steps=num_steps), maxlen=0)
            num_fetched += reader.cache.num_bytes_fetched
        assert num_fetched <= 1.1 * sum(shard.num_bytes for shard in manifest.splits["train"])


def test_two_windows_per_worker_in_memory_are_enough(store: Store, preset: Preset, tmp_path: Path) -> None:
    """As docs/data.md says."""
    write_csv(tmp_path / "raw/0.csv", range(1800))
    config = data_config()
    manifest = write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest
    order = open_order(preset, manifest)
    largest = max(shard.num_bytes for shard in manifest.splits["train"])
    reader = make_reader(store, "tiny", manifest, "train", memory_bytes=2 * order.virtual_workers * largest)
    num_steps = order.num_samples // order.batch_size
    deque(Stream(reader, order, workers=range(4), step=0, num_steps=num_steps), maxlen=0)
    assert reader.cache.num_bytes_fetched <= 1.3 * sum(shard.num_bytes for shard in manifest.splits["train"])


@dataclass(frozen=True, kw_only=True)
class Growing(Tiny):
    """Decodes a sample of some bytes to one of a megabyte, or fails."""

    fails_at: int = -1

    def decode(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        if int(sample["label"]) == self.fails_at:
            raise ValueError("bad picture")
        return {"x": np.zeros(1 << 18, dtype=np.float32), "label": sample["label"]}


def growing_stream(store: Store, preset: Preset, manifest: Manifest, *, fails_at: int = -1) -> Stream:
    decode = Growing(fails_at=fails_at).decode
    reader = make_reader(store, "tiny", manifest, "train", maybe_decode=decode)
    return Stream(reader, open_order(preset, manifest), workers=range(4), step=0, num_steps=10**7)


def test_blocks_are_sized_by_decoded_samples(store: Store, preset: Preset, manifest: Manifest) -> None:
    stream = growing_stream(store, preset, manifest)
    assert stream._block_steps() == 1
    microbatches = iter(stream)
    assert next(microbatches).fields["x"].nbytes == 6 << 20
    microbatches.close()  # type: ignore[attr-defined]


def test_a_decode_that_fails_names_the_sample(store: Store, preset: Preset, manifest: Manifest) -> None:
    with pytest.raises(DeterministicError, match=r"sample 0\.csv:\d+#0: decode\(\) failed: ValueError: bad picture"):
        deque(growing_stream(store, preset, manifest, fails_at=1), maxlen=0)


def test_a_stream_that_is_left_leaves_no_thread(store: Store, preset: Preset, manifest: Manifest) -> None:
    before = set(threading.enumerate())
    stream = iter(
        Stream(
            make_reader(store, "tiny", manifest, "train"),
            open_order(preset, manifest),
            workers=range(4),
            step=0,
            num_steps=STEPS,
        )
    )
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: not set(threading.enumerate()) - before, what="the stream's threads to end")


@pytest.mark.parametrize("data_workers", [0, 2])
def test_a_record_that_cannot_be_decoded_is_named(
    store: Store, preset: Preset, manifest: Manifest, data_workers: int
) -> None:
    """By its id, which can be withdrawn."""
    preset = replace(preset, recipe="tests.unit.test_stream:Refusing")
    with pytest.raises(DeterministicError) as caught:
        next(feed_of(store, preset, manifest, data_workers).microbatches(workers=range(4), step=0))
    (record,) = caught.value.records
    assert str(caught.value).startswith(f"sample {record}#0: decode() failed")


@dataclass(frozen=True, kw_only=True)
class Dies(Tiny):
    """Its decode() does, as one written in C may on a broken image."""

    def decode(self, sample: Sample, random: np.random.Generator | None) -> Sample:
        os.kill(os.getpid(), signal.SIGSEGV)
        return sample


def test_a_reading_process_that_dies_is_told_by_its_signal_and_without_its_pid(
    store: Store, preset: Preset, manifest: Manifest
) -> None:
    """So that two deaths are alike."""
    preset = replace(preset, recipe=f"{__name__}:Dies")
    with pytest.raises(ReaderDiedError, match=r"^a process that reads for a worker killed by SIGSEGV$") as caught:
        next(feed_of(store, preset, manifest, 2).microbatches(workers=range(4), step=0))
    assert _class_name(caught.value) == CRASHED
