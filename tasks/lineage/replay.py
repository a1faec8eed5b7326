"""Doing a window of a version's training once more, and comparing each step with what was told of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.verify import LineageError, require_run, verify_identity
from training.errors import UserError
from training.runs.history import committed_steps
from training.runs.proof import own_recipe
from training.runs.record import Record, RunRecord
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from training.replay import Replayed

WITNESSES = ("weights", "loss", "grad_norm", "samples")
"""What is compared of a step. The first is noted every so many steps only; the others of each, to the last bit."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Steps, both included, counted from 1."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A step that gave the same as when it was trained."""

    step: int
    weights: str
    """Its digest."""
    has_digest: bool
    """Whether the weights' digest was noted then; else loss, gradient norm and samples alone were compared."""
    is_asked: bool
    """Whether it lies in the window; the steps before it, from the checkpoint on, are compared all the same."""


def parse_window(text: str | None, num_steps: int, newest_checkpoint: int) -> Window:
    """`A:B`, of which one may be missing; without any, the steps after the last checkpoint before the end.

    Raises `UserError` for what is no part of the run's steps.
    """
    if text is None:
        return Window(first=newest_checkpoint + 1, last=num_steps)
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if found is None:
        raise UserError(f"--steps {text!r}: must read A:B, as in --steps 101:120")
    first, last = (int(number) if number else None for number in found.groups())
    window = Window(first=first if first is not None else 1, last=last if last is not None else num_steps)
    if not 1 <= window.first <= window.last <= num_steps:
        raise UserError(f"--steps {text}: the run has the steps 1 to {num_steps}, and A must not be after B")
    return window


def replay(store: Store, kept: KeptVersion, steps: str | None) -> tuple[Window, int, Iterator[Compared]]:
    """The window, the step of the checkpoint that it begins at (0: none), and each step from there, once compared.

    Raises `LineageError` naming the first step that differs, or what differs of the recipe's source; `UserError` if
    this machine cannot give the same bits.
    """
    from training.replay import begin_replay

    record, job = require_run(store, kept)
    for _ in verify_identity(store, kept, job):
        pass
    assert record.result is not None
    older = [reference.step for reference in record.checkpoints if reference.step < record.result.step]
    window = parse_window(steps, record.result.step, max(older, default=0))
    told = told_steps(store, record)
    job = dataclasses.replace(
        job, location=store.location
    )  # where it was trained, the store may have had another address
    own_recipe(store, job)
    start, done = begin_replay(job, record, first=window.first)
    return window, start, _compared(done, told, window)


def told_steps(store: Store, record: Record) -> dict[int, dict[str, Any]]:
    """What the run's events tell of each committed step."""
    return {event.step: event.values for event in committed_steps(RunRecord(store, record.key), record)}


def _compared(done: Iterator[Replayed], told: dict[int, dict[str, Any]], window: Window) -> Iterator[Compared]:
    for step in done:
        yield compare(step, told.get(step.step), is_asked=window.first <= step.step)
        if step.step == window.last:
            return


def compare(now: Replayed, maybe_told: dict[str, Any] | None, *, is_asked: bool) -> Compared:
    """Raises `LineageError` naming what of the step differs."""
    if maybe_told is None:
        raise LineageError(f"step {now.step} is missing from the run's events")
    for name in WITNESSES:
        if name in maybe_told and maybe_told[name] != getattr(now, name):
            raise LineageError(
                f"step {now.step} differs: its {name.replace('_', ' ')} is {getattr(now, name)} now, and was"
                f" {maybe_told[name]}"
            )
    return Compared(step=now.step, weights=now.weights, has_digest="weights" in maybe_told, is_asked=is_asked)
