"""What a checkpoint and its loading ask of the store: the real saver, with the ranks as threads of one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not listed

from benchmarks.scale.counting import CountingProxy, since
from training.checkpoints.checkpoint import newest_proven
from training.checkpoints.saver import CheckpointSaver
from training.runs.events import EventWriter
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store, StoreLocation

NUM_TENSORS = 24
NUM_ELEMENTS = 1000
NUM_BYTES = 4 * NUM_TENSORS * NUM_ELEMENTS
TOKEN = 1


def measure(num_ranks: int, location: StoreLocation) -> dict[str, Any]:
    """A commit that drops the checkpoint before it; then its loading by one rank, as all of them do."""
    with CountingProxy(location.endpoint or "") as proxy:
        store = Store(replace(location, endpoint=proxy.endpoint))
        run = RunRecord(store, f"{num_ranks:064x}")
        run.create_if_missing()
        record = run.update(lambda newest: replace(newest, token=TOKEN))
        events = EventWriter(store, run.prefix(record), TOKEN)
        savers = _savers(run, record, events, num_ranks)
        _save(savers, 1)
        before = proxy.counts()
        events.add("step", step=2)
        _save(savers, 2)
        committed = proxy.counts()
        assert newest_proven(run, token=TOKEN) is not None
        events.close()
        return {
            "num_ranks": num_ranks,
            "num_tensors": NUM_TENSORS,
            "commit": since(before, committed),
            "load": since(committed, proxy.counts()),
        }


def _savers(run: RunRecord, record: Record, events: EventWriter, num_ranks: int) -> list[CheckpointSaver]:
    rendezvous = HashStore()
    return [
        CheckpointSaver(
            run=run,
            prefix=run.prefix(record),
            rendezvous=rendezvous,
            rank=rank,
            world_size=num_ranks,
            token=TOKEN,
            keep=1,
            before_commit=events.flush,
        )
        for rank in range(num_ranks)
    ]


def _save(savers: Sequence[CheckpointSaver], step: int) -> None:
    tensors = {f"model.{number}": torch.full((NUM_ELEMENTS,), float(step)) for number in range(NUM_TENSORS)}
    for saver in savers:
        saver.save(step, tensors, on_commit=lambda reference: None)
    for saver in savers:
        saver.wait()
