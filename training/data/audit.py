"""Proof after the fact that a run read what the order says: each epoch each sample exactly once, over all attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.config import Preset
from training.data import ledger
from training.data.cache import ShardCache, fetch_from
from training.data.manifest import load_manifest
from training.data.opening import open_order
from training.data.order import Order
from training.data.reader import LazyIds
from training.errors import DamagedError, UserError
from training.runs.history import committed_steps
from training.runs.proof import find_job
from training.runs.record import RunRecord
from training.s3.objectstore import Store


class LedgerError(DamagedError):
    """A run did not read what its order says. The message names the first step where."""


@dataclass(frozen=True, kw_only=True)
class LedgerProof:
    """What was proven of a run."""

    run_key: str
    dataset_digest: str
    num_steps: int
    num_samples_read: int
    num_whole_epochs: int
    """Epochs that were read from their first sample to their last."""
    num_attempts: int


def verify_run(store: Store, run_key: str) -> LedgerProof:
    """Compare every committed step's line in the ledger with the records that the order gives, read again.

    Raises `LedgerError` naming the first violation, `UserError` if the run has nothing to prove yet.
    """
    run = RunRecord(store, run_key)
    record = run.read()
    job = find_job(store, run_key)
    if job is None:
        raise UserError(f"run {run_key[:12]} has no job document: it never trained")
    preset, digest = job.preset, job.dataset_digest
    lines = {event.step: str(event.values.get("samples")) for event in committed_steps(run, record)}
    num_steps = record.result.step if record.result is not None else max(lines, default=0)
    if num_steps == 0:
        raise UserError(f"run {run_key[:12]} has committed no step yet")
    order = _check(store, preset, digest, lines, num_steps)
    return LedgerProof(
        run_key=run_key,
        dataset_digest=digest,
        num_steps=num_steps,
        num_samples_read=num_steps * order.batch_size,
        num_whole_epochs=num_steps * order.batch_size // order.num_samples,
        num_attempts=len(record.attempt_starts),
    )


def _check(store: Store, preset: Preset, digest: str, lines: Mapping[int, str], num_steps: int) -> Order:
    manifest = load_manifest(store, preset.data.name, digest)
    order = open_order(preset, manifest)
    cache = ShardCache(fetch_from(store, preset.data.name), manifest.splits["train"])
    seen = Seen(order.num_samples)
    try:
        for step in range(num_steps):
            indices = order.batch(step)
            numbers, rows = order.shards_of(indices)
            shards = {number: cache.get(number) for number in np.unique(numbers).tolist()}
            _require_line(step, lines.get(step + 1), order, list(LazyIds(shards, numbers, rows)))
            seen.add(step, indices)
    finally:
        cache.close()
    return order


def _require_line(step: int, found: str | None, order: Order, ids: Sequence[str]) -> None:
    if found is None:
        raise LedgerError(f"step {step + 1} is missing from the ledger")
    due = ledger.expected(order, ids)
    if found != due:
        raise LedgerError(
            f"step {step + 1} did not read the records of the declared order: its line is {found}, where {due} was due"
            f" (records {ids[0]}, {ids[1 % len(ids)]}, …)"
        )


class Seen:
    """That each epoch of a sequence has each sample once: a mark per sample, wiped at each epoch's end."""

    def __init__(self, num_samples: int) -> None:
        self._marks: NDArray[np.bool_] = np.zeros(num_samples, dtype=np.bool_)
        self._num_marked = 0

    def add(self, step: int, indices: NDArray[np.int64]) -> None:
        """The next indices of the sequence. Raises `LedgerError` naming the step of a sample that comes twice."""
        while len(indices):
            here = indices[: len(self._marks) - self._num_marked]
            if len(np.unique(here)) < len(here) or self._marks[here].any():
                raise LedgerError(f"step {step + 1} reads a sample for the second time in its epoch")
            self._marks[here] = True
            self._num_marked += len(here)
            if self._num_marked == len(self._marks):
                self._marks[:] = False
                self._num_marked = 0
            indices = indices[len(here) :]
