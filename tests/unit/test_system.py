"""Samples of machines: each arrives once, per node in order; a store that is away only delays them."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace

import pytest

from tests.unit.fakes import FaultyStore
from training.documents import canonical_json
from training.errors import DamagedError
from training.runs import system
from training.runs.system import Sample, SampleReader, SampleWriter, keep_sampling, take_sample
from training.s3.objectstore import Store

PREFIX = "runs/k/0/"


def sample(time: float) -> Sample:
    return replace(take_sample(), time=time)


def test_samples_of_all_nodes_arrive_once(store: Store) -> None:
    reader = SampleReader(store, PREFIX)
    assert list(reader.read_new()) == []
    writers = [
        SampleWriter(store, PREFIX, node=node, incarnation=name) for node, name in ((0, "a"), (1, "b"), (1, "c"))
    ]
    for time, writer in enumerate(writers):
        writer.send(sample(time))
    assert [(node, found.time) for node, found in reader.read_new()] == [(0, 0), (1, 1), (1, 2)]
    writers[0].send(sample(3))
    assert [(node, found.time) for node, found in reader.read_new()] == [(0, 3)]


def test_store_that_is_away_delays_samples_and_loses_none(store: Store) -> None:
    away = FaultyStore(store, lambda key: away.num_faults < 2)
    writer = SampleWriter(away, PREFIX, node=0, incarnation="a")
    for time in range(4):
        writer.send(sample(time))
    assert away.num_faults == 2
    assert [found.time for _, found in SampleReader(store, PREFIX).read_new()] == [0, 1, 2, 3]


def test_sample_whose_reply_was_lost_is_there_once(store: Store) -> None:
    away = FaultyStore(store, lambda key: away.num_faults < 1, apply_first=True)
    writer, reader = SampleWriter(away, PREFIX, node=0, incarnation="a"), SampleReader(store, PREFIX)
    writer.send(sample(0))
    writer.send(sample(1))
    assert [found.time for _, found in reader.read_new()] == [0, 1]


def test_agent_goes_on_sampling_until_it_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "SAMPLE_SECONDS", 0.0)
    reader = SampleReader(store, PREFIX)

    async def run() -> None:
        sampling = asyncio.create_task(keep_sampling(SampleWriter(store, PREFIX, node=0, incarnation="a")))
        found = []
        while len(found) < 3:
            found += await asyncio.to_thread(lambda: list(reader.read_new()))
        sampling.cancel()
        assert all(0 <= each.cpu_utilization_percentage <= 100 for _, each in found)

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("stream", ["a-b", "-", "0", "\u0661-a", "99999999999-a"], ids=len)
def test_folder_that_is_no_nodes_is_passed_over(store: Store, stream: str) -> None:
    SampleWriter(store, PREFIX, node=0, incarnation="a").send(sample(0))
    store.put(f"{PREFIX}system/{stream}/000000.jsonl", b"no sample")
    assert [node for node, _ in SampleReader(store, PREFIX).read_new()] == [0]


@pytest.mark.parametrize("time", ["inf", "nan", 1e300, -1.0])
def test_sample_of_no_time_is_damage(store: Store, time: object) -> None:
    document = {**asdict(sample(0)), "time": time}
    store.put(f"{PREFIX}system/0-a/000000.jsonl", canonical_json(document))
    with pytest.raises(DamagedError, match=r"000000\.jsonl is damaged"):
        list(SampleReader(store, PREFIX).read_new())
