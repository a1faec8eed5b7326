"""What one rank does, whoever started it: check that it may, join the group, train, and leave together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training import environment
from training.control import Note
from training.data.loader import Feed
from training.errors import UserError
from training.events import EventWriter
from training.handover import Handover
from training.job import Job
from training.loop import Rank, Trainer
from training.recipe import Recipe, load_recipe
from training.record import Record, RunRecord, run_key, with_environment
from training.saver import CheckpointSaver


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Which rank of the group of `token` this process is."""

    rank: int
    local_rank: int
    world_size: int
    token: int


def train(
    job: Job,
    seat: Seat,
    rendezvous: Any,
    handover: Handover | None = None,
    tell: Callable[[Note], None] = lambda note: None,
    *,
    make_events: type[EventWriter] = EventWriter,
) -> None:
    """Train the job's run to its committed result. `rendezvous` is the group's store; `tell` hears how far it came.

    `handover` holds what the group before left, and takes what this one leaves.

    Raises what made it fail; after that, no collective may follow.
    """
    device = prepare(seat)
    recipe = load_recipe(job.preset)
    require_same_source(job, recipe)
    run = job.open_run()
    record = _admitted(run, seat.token)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=rendezvous,
        rank=seat.rank,
        world_size=seat.world_size,
        timeout=timedelta(seconds=job.preset.launch.collective_timeout_seconds),
    )
    events = make_events(run.store, run.prefix(record), seat.token) if seat.rank == 0 else None
    trainer = Trainer(
        preset=job.preset,
        recipe=recipe,
        feed=Feed(preset=job.preset, location=job.location, dataset_digest=job.dataset_digest),
        initial=job.initial,
        run=run,
        saver=_saver(job, seat, run, rendezvous, events),
        events=events,
        rank=Rank(rank=seat.rank, world_size=seat.world_size, token=seat.token, device=device),
        handover=handover,
        tell=tell,
    )
    trainer.train()
    with trainer.handover.waiting():
        _leave_together(rendezvous, seat)


def prepare(seat: Seat) -> torch.device:
    """Arithmetic that gives the same bits each time, and the device to do it on."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
    torch.set_num_threads(environment.THREADS_PER_RANK)
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda", seat.local_rank) if torch.cuda.is_available() else torch.device("cpu")


def require_same_source(job: Job, recipe: Recipe) -> None:
    """Raises `UserError` if the recipe here is another one than the run's."""
    weights = job.initial.weights_sha256 if job.initial else None
    if run_key(recipe=recipe, preset=job.preset, dataset_digest=job.dataset_digest, initial_weights=weights) != job.key:
        raise UserError("the recipe's source changed since this run was submitted: start the pipeline again")


def _admitted(run: RunRecord, token: int) -> Record:
    """Raises `FencedError` if a newer group owns the run, `UserError` if it was begun in another environment."""
    here = environment.fingerprint()
    record = run.update(lambda newest: with_environment(newest, here, token=token))
    environment.require_same(record.environment, here)
    return record


def _saver(job: Job, seat: Seat, run: RunRecord, rendezvous: Any, maybe_events: EventWriter | None) -> CheckpointSaver:
    return CheckpointSaver(
        run=run,
        rendezvous=rendezvous.clone(),
        rank=seat.rank,
        world_size=seat.world_size,
        token=seat.token,
        keep=job.preset.train.keep_checkpoints,
        keep_every_steps=job.preset.train.keep_every_steps,
        before_commit=maybe_events.flush if maybe_events else lambda: None,
    )


def _leave_together(rendezvous: Any, seat: Seat) -> None:
    """Rank 0 may hold the store: it leaves last, and the others only once the result is committed."""
    if seat.rank == 0:
        rendezvous.set("result-committed", "1")
        rendezvous.wait([f"left/{rank}" for rank in range(1, seat.world_size)] or ["result-committed"])
    else:
        rendezvous.wait(["result-committed"])
        rendezvous.set(f"left/{seat.rank}", "1")
