"""Attempts at a run of `tests.unit.tiny`, in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.unit.fakes import DictRendezvous
from tests.unit.tiny import Tiny, exact_arithmetic, make_trainer, tiny_preset
from training.checkpoints.saver import CheckpointSaver
from training.loop import Trainer
from training.memory.handover import Handover
from training.runs.events import EventWriter
from training.runs.history import committed_steps
from training.runs.record import RunRecord
from training.s3.objectstore import Store


def step_through(trainer: Trainer, until: int) -> Trainer:
    with exact_arithmetic():
        while trainer.state.step < until:
            trainer.train_step()
    return trainer


def attempt(
    run: RunRecord,
    *,
    token: int,
    store: Store | None = None,
    recipe: Tiny | None = None,
    handover: Handover | None = None,
    **train: Any,
) -> Trainer:
    """A trainer of one rank under `token`, which the record is set to."""
    prefix = run.prefix(run.update(lambda record: replace(record, token=token)))
    preset = tiny_preset(**train)
    on = RunRecord(store or run.store, run.run_key)
    events = EventWriter(on.store, prefix, token)
    saver = CheckpointSaver(
        run=on,
        prefix=prefix,
        rendezvous=DictRendezvous(),  # type: ignore[arg-type]  # it has all that is used
        rank=0,
        world_size=1,
        token=token,
        keep=preset.train.keep_checkpoints,
        before_commit=events.flush,
    )
    return make_trainer(
        preset=preset, recipe=recipe, run=on, saver=saver, events=events, token=token, handover=handover
    )


def train(trainer: Trainer) -> None:
    with exact_arithmetic():
        trainer.train()


def history(run: RunRecord) -> list[int]:
    return [event.step for event in committed_steps(run, run.read())]
