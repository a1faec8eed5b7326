"""The ledger: what was read is proven, and every way to read something else is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.tracking import METRICS
from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.reading import make_reader
from tests.unit.tiny import Tiny, tiny_preset
from training.config import Preset
from training.data import ledger
from training.data.audit import LedgerError, Seen, verify_run
from training.data.manifest import Manifest, manifest_key
from training.data.opening import open_order
from training.data.stream import Stream
from training.data.writer import write_dataset
from training.errors import UserError
from training.runs.events import EventWriter, chunk_key
from training.runs.job import Job, store_job
from training.runs.record import RunRecord, with_resume_step
from training.s3.objectstore import Store

BATCH, WORKERS = 20, 5


@pytest.fixture
def preset() -> Preset:
    return replace(tiny_preset(steps=20), data=data_config(), seed=4)


@pytest.fixture
def manifest(store: Store, tmp_path: Path) -> Manifest:
    write_csv(tmp_path / "raw/0.csv", range(150))
    config = data_config()
    return write_dataset(store, local_source(tmp_path, config), config, Tiny()).manifest


def read_lines(store: Store, preset: Preset, manifest: Manifest) -> dict[int, str]:
    """The lines of a run that reads rightly: by the ranks' own code, each virtual worker for itself."""
    reader = make_reader(store, "tiny", manifest, "train")
    sums: dict[int, np.ndarray] = {}  # type: ignore[type-arg]
    order = open_order(preset, manifest)
    for batch in Stream(reader, order, workers=range(WORKERS), step=0, num_steps=preset.train.steps):
        sums[batch.step + 1] = sums.get(batch.step + 1, 0) + ledger.entries(batch.worker, batch.ids)
    return {step: ledger.seal(entries) for step, entries in sums.items()}


def record_run(store: Store, preset: Preset, manifest: Manifest, attempts: list[tuple[int, dict[int, str]]]) -> None:
    """A run whose attempts began at given steps and wrote given lines."""
    run = RunRecord(store, "k")
    run.create_if_missing()
    store_job(store, Job(key="k", generation=0, preset=preset, dataset_digest=manifest.digest, location=store.location))
    for token, (start, lines) in enumerate(attempts, start=1):
        run.update(lambda record, t=token, s=start: with_resume_step(replace(record, token=t), s, token=t))  # type: ignore[misc]
        writer = EventWriter(store, run.prefix(run.read()), token)
        for step, line in lines.items():
            writer.add("step", step=step, **dict.fromkeys(METRICS, 0.0), samples=line)
        writer.close()


def test_a_run_that_read_rightly_is_proven_over_its_attempts(store: Store, preset: Preset, manifest: Manifest) -> None:
    """Steps that were done twice count once; what a dead attempt did beyond the resumed step counts not at all."""
    lines = read_lines(store, preset, manifest)
    first = {**{step: lines[step] for step in range(1, 12)}, 10: lines[10], 11: "never committed"}
    record_run(store, preset, manifest, [(0, first), (8, {step: lines[step] for step in range(9, 21)})])
    proof = verify_run(store, "k")
    assert (proof.num_steps, proof.num_attempts, proof.num_samples_read) == (20, 2, 400)
    assert proof.num_whole_epochs == 400 // manifest.num_samples("train") == 3
    assert proof.dataset_digest == manifest.digest


def test_a_line_is_the_same_whoever_sums(store: Store, preset: Preset, manifest: Manifest) -> None:
    lines, order = read_lines(store, preset, manifest), open_order(preset, manifest)
    ids = make_reader(store, "tiny", manifest, "train").read(range(order.num_samples)).ids
    for step in range(20):
        assert ledger.expected(order, [ids[index] for index in order.batch(step)]) == lines[step + 1]


def swapped(lines: dict[int, str]) -> dict[int, str]:
    return {**lines, 3: lines[4], 4: lines[3]}


def without(lines: dict[int, str]) -> dict[int, str]:
    return {step: line for step, line in lines.items() if step != 7}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (swapped, "step 3 did not read the records of the declared order"),
        (without, "step 7 is missing from the ledger"),
        (lambda lines: {**lines, 15: lines[14]}, "step 15 did not read"),
        (lambda lines: {**lines, 20: "0" * 16}, "step 20 did not read"),
    ],
)
def test_the_first_violation_is_named(
    store: Store, preset: Preset, manifest: Manifest, change: object, complaint: str
) -> None:
    assert callable(change)
    record_run(store, preset, manifest, [(0, change(read_lines(store, preset, manifest)))])
    with pytest.raises(LedgerError, match=complaint):
        verify_run(store, "k")


def test_a_dataset_swapped_after_the_fact_is_noticed(store: Store, preset: Preset, manifest: Manifest) -> None:
    """The lines come from the decoded records: another order of shards under the same name does not prove them."""
    lines = read_lines(store, preset, manifest)
    shards = manifest.splits["train"]
    other = replace(manifest, splits={**manifest.splits, "train": (*shards[1:], shards[0])})
    store.put(manifest_key("tiny", other.digest), other.to_bytes())
    record_run(store, preset, other, [(0, lines)])
    with pytest.raises(LedgerError, match="step 1 did not read"):
        verify_run(store, "k")


def test_a_run_without_a_step_has_nothing_to_prove(store: Store, preset: Preset, manifest: Manifest) -> None:
    RunRecord(store, "k").create_if_missing()
    with pytest.raises(UserError, match="never trained"):
        verify_run(store, "k")
    record_run(store, preset, manifest, [(0, {})])
    with pytest.raises(UserError, match="no step yet"):
        verify_run(store, "k")


def test_an_event_without_a_line_is_a_violation(store: Store, preset: Preset, manifest: Manifest) -> None:
    record_run(store, preset, manifest, [(0, read_lines(store, preset, manifest))])
    key = chunk_key("runs/k/0/", 1, 0)
    events = [json.loads(line) for line in store.get(key).splitlines()]
    del events[4]["values"]["samples"]
    store.put(key, "".join(json.dumps(event) + "\n" for event in events).encode())
    with pytest.raises(LedgerError, match="step 5"):
        verify_run(store, "k")


def test_entries_depend_on_order_place_and_boundaries() -> None:
    digests = {
        ledger.entries(worker, ids).tobytes()
        for worker, ids in [
            (0, ["a", "b"]),
            (0, ["b", "a"]),
            (1, ["a", "b"]),
            (0, ["ab"]),
            (0, ["a", "b", ""]),
            (0, []),
        ]
    }
    assert len(digests) == 6


def test_a_sum_of_the_most_virtual_workers_is_exact() -> None:
    most = np.full(ledger.NUM_ENTRIES, 255, dtype=np.float32)
    total = np.zeros_like(most)
    for _ in range(ledger.MAX_VIRTUAL_WORKERS):
        total += most
    assert total.tolist() == [255.0 * ledger.MAX_VIRTUAL_WORKERS] * ledger.NUM_ENTRIES


def test_a_sample_that_comes_twice_in_an_epoch_is_noticed() -> None:
    seen = Seen(5)
    seen.add(0, np.array([3, 1, 0, 4, 2, 2]))
    seen.add(1, np.array([0, 1]))
    with pytest.raises(LedgerError, match="step 3 reads a sample for the second time"):
        seen.add(2, np.array([1]))
