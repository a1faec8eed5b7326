"""Readers killed again and again, the next group having another size: the batches are those of a calm reader."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate, count
from pathlib import Path

import pytest

from tests.faults.evidence import write_evidence
from tests.unit.data_source import data_config, local_source, tiny_line, write_csv
from tests.unit.reading import make_reader
from tests.unit.tiny import Tiny
from training.data.manifest import Manifest
from training.data.order import Order
from training.data.writer import split_of, write_dataset
from training.recipe import Record
from training.s3.objectstore import Store

GROUP_SIZES = (4, 2, 3, 1, 4)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    store: Store
    manifest: Manifest
    order: Order
    num_steps: int

    def start_rank(self, rank: int, world_size: int, step: int, stop: int) -> subprocess.Popen[str]:
        told = {
            "location": asdict(self.store.location),
            "dataset": "tiny",
            "digest": self.manifest.digest,
            "order": [*asdict(self.order).values()][1:],
            "rank": rank,
            "world_size": world_size,
            "step": step,
            "stop": stop,
            "num_steps": self.num_steps,
        }
        command = [sys.executable, "-m", "tests.faults.reading_rank", json.dumps(told)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def make_dataset(store: Store, folder: Path, num_samples: int) -> Dataset:
    """Epochs end within batches: no size divides another."""
    config = data_config(shard_bytes=1024 if num_samples < 10_000 else 32_768, test_percent=1)
    is_train = (split_of(Record(id="", data=tiny_line(n).encode()), config.test_percent) == "train" for n in count())
    num_records = next(n for n, total in enumerate(accumulate(is_train), start=1) if total == num_samples)
    write_csv(folder / "raw/0.csv", range(num_records))
    manifest = write_dataset(store, local_source(folder, config), config, Tiny()).manifest
    assert manifest.num_samples("train") == num_samples
    order = Order(manifest.shard_sizes("train"), 3, 264, 12, 2)
    assert not order.is_whole
    num_epochs = 3 if num_samples < 10_000 else 1
    return Dataset(
        store=store,
        manifest=manifest,
        order=order,
        num_steps=-(-num_epochs * order.num_samples // order.batch_size) + 2,
    )


def read_until_killed(data: Dataset, world_size: int, step: int, stop: int) -> dict[tuple[int, int], list[str]]:
    """What a group read by (step, worker). Each rank is killed as soon as it has shown a part of step `stop`."""
    ranks = [data.start_rank(rank, world_size, step, stop) for rank in range(world_size)]
    found: dict[tuple[int, int], list[str]] = {}
    for rank in ranks:
        assert rank.stdout is not None
        for line in rank.stdout:
            number, worker, ids = json.loads(line)
            found[number, worker] = ids
            if number == stop:
                rank.kill()
                break
        rank.stdout.close()
        assert rank.wait(timeout=120) == (-9 if stop < data.num_steps else 0)
    return found


def disturbed(data: Dataset, chance: random.Random) -> dict[int, list[str]]:
    """The committed batches: a step counts once a group has read all of it, the one it was killed in is read again."""
    batches: dict[int, list[str]] = {}
    stops = [*sorted(chance.sample(range(1, data.num_steps), len(GROUP_SIZES) - 1)), data.num_steps]
    for world_size, stop in zip(GROUP_SIZES, stops, strict=True):
        step = len(batches)
        found = read_until_killed(data, world_size, step, stop)
        for number in range(step, stop):
            batches[number] = [i for worker in range(data.order.virtual_workers) for i in found[number, worker]]
    return batches


def check(data: Dataset, seed: int) -> None:
    batches = disturbed(data, random.Random(seed))
    reader = make_reader(data.store, "tiny", data.manifest, "train")
    ids = list(reader.read(range(len(reader))).ids)
    assert len(set(ids)) == len(ids)
    calm = {step: [ids[index] for index in data.order.batch(step)] for step in range(data.num_steps)}
    assert batches == calm
    read = [sample_id for step in range(data.num_steps) for sample_id in batches[step]]
    for epoch in range(len(read) // len(ids)):
        assert sorted(read[epoch * len(ids) : (epoch + 1) * len(ids)]) == sorted(ids), "lost or read twice"


@pytest.mark.parametrize("num_samples", [2_003, pytest.param(65_537, marks=pytest.mark.soak)])
def test_batches_are_the_same_through_kills_and_changes_of_size(store: Store, tmp_path: Path, num_samples: int) -> None:
    check(make_dataset(store, tmp_path, num_samples), seed=1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_sequences_of_kills(store: Store, tmp_path: Path) -> None:
    rows = []
    for num_samples in (2_003, 65_537):
        data = make_dataset(store, tmp_path / str(num_samples), num_samples)
        for seed in range(10):
            check(data, seed)
            rows.append({"num_samples": num_samples, "seed": seed, "group_sizes": GROUP_SIZES, "equal_to_calm": True})
    write_evidence("reading-through-kills", rows=rows)
