"""A window of a run's steps, done once more on one rank: the same bits, whatever number of ranks did them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from training import environment, rank
from training.checkpoints.checkpoint import load_checkpoint, load_initial
from training.checkpoints.saver import CheckpointSaver
from training.config import ParallelConfig, Preset
from training.data.loader import Feed
from training.errors import DamagedError, UntrustedError, UserError
from training.loop import Trainer
from training.runs.job import Job
from training.runs.record import CheckpointRef, Record, RunRecord
from training.step import Rank


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a step gave this time, exactly."""

    step: int
    loss: float
    grad_norm: float
    samples: str
    weights: str
    """The digest of all weights after it (`TrainState.weights_digest`)."""


def begin_replay(job: Job, record: Record, *, first: int) -> tuple[int, Iterator[Replayed]]:
    """The step after which a replay begins that does step `first`, and its steps, one after another to the run's end.

    It begins at the newest checkpoint before `first` that is whole, or at step 0, and writes nothing to the store.
    Raises `UserError` if this machine's environment or the recipe's source is another than the run's, or its bits are
    not those of one rank.
    """
    if setting := job.preset.train.maybe_inexact:
        raise UserError(f"run {job.key[:12]} was trained with {setting}, which promises no bits to compare")
    if (tensor := job.preset.parallel.tensor) > 1:
        raise UserError(
            f"run {job.key[:12]} was trained with parallel.tensor = {tensor}: its bits are those of {tensor} ranks"
            " together, and a replay is done by one. To compare, train it again with --fresh: the bits are the same"
        )
    environment.require_same(record.environment, environment.fingerprint())
    kit = rank.prepare(job, local_rank=0)
    alone = _alone(job.preset)
    trainer = Trainer(
        preset=alone,
        recipe=kit.recipe,
        feed=Feed(preset=alone, location=job.location, dataset_digest=job.dataset_digest),
        initial=job.initial,
        run=job.open_run(),
        record=record,
        saver=cast(CheckpointSaver, None),  # no checkpoint is due
        events=None,
        rank=Rank(rank=0, world_size=1, token=record.token, device=kit.device),
        state=kit.maybe_state,
    )
    start = _load(trainer, job, record, first)
    trainer.checkpoints.committed_step = start  # or it would forget the steps that a newer one holds
    return start, _steps(trainer)


def _alone(preset: Preset) -> Preset:
    """With all that changes no bit as one rank wants it."""
    train = replace(
        preset.train,
        checkpoint_every_steps=preset.train.steps,
        keep_every_steps=None,
        validate_every_steps=None,
        digest_every_steps=1,
    )
    launch = replace(preset.launch, nodes=1, min_nodes=1, processes_per_node=1, data_workers=0, balance_seconds=0.0)
    return replace(preset, train=train, launch=launch, parallel=ParallelConfig())


def _load(trainer: Trainer, job: Job, record: Record, first: int) -> int:
    """Take up the newest whole checkpoint before step `first`."""
    for reference in reversed([c for c in record.checkpoints if c.step < first]):
        if _take_up(trainer, record, reference):
            return reference.step
    if job.initial is not None:
        trainer.state.load_weights(load_initial(trainer.run.store, job.initial))
    return 0


def _take_up(trainer: Trainer, record: Record, reference: CheckpointRef) -> bool:
    run: RunRecord = trainer.run
    try:
        tensors = load_checkpoint(run.store, run.prefix(record), reference)
    except UntrustedError:
        raise
    except DamagedError:  # `verify` names it; an older one gives the same bits
        return False
    trainer.state.load(tensors, step=reference.step)
    return True


def _steps(trainer: Trainer) -> Iterator[Replayed]:
    trainer.handover.keep(trainer.settled_state)
    try:
        while trainer.state.step < trainer.preset.train.steps:
            outcome = trainer.train_step()
            yield Replayed(
                step=trainer.state.step,
                loss=outcome.loss,
                grad_norm=outcome.grad_norm,
                samples=outcome.samples,
                weights=str(trainer.handover.journal[-1].values["weights"]),
            )
            trainer.handover.forget(trainer.state.step)
    finally:
        trainer.lay_down_workers()
