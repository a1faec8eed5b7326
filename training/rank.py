"""What one rank does, whoever started it: check that it may, join the group, train, and leave together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from training import environment
from training.arithmetic.determinism import settle_arithmetic
from training.beside import beside
from training.checkpoints.saver import CheckpointSaver
from training.checkpoints.state import TrainState
from training.config import Preset
from training.connections import Connections
from training.control import Note, Seat
from training.data.loader import Feed
from training.diagnosis.crashes import Crashes
from training.errors import UserError
from training.loop import Trainer
from training.memory.handover import GroupOver, Handover
from training.parallel.pipeline import require_cut
from training.parallel.state_in_stages import require_separable
from training.parallel.tensor import require_cuttable
from training.parallel.update import require_shardable
from training.recipe import Recipe, load_recipe
from training.replica_loop import ReplicaTrainer
from training.runs.events import EventWriter
from training.runs.job import Job
from training.runs.record import Record, RunRecord, run_key, with_environment
from training.servers.colocated import Colocated
from training.servers.stale_ranks import StaleServers
from training.sharded_loop import ShardedTrainer
from training.signatures import keyring
from training.stale_loop import StaleTrainer
from training.step import Rank


@dataclass(kw_only=True)
class Kit:
    """What a process brings into every group that it joins, made before anybody waits for it."""

    job: Job
    device: torch.device
    recipe: Recipe
    environment: dict[str, str]
    maybe_state: TrainState | None
    """A new one, or that of the group before; while it is being trained, it is the Trainer's."""
    connections: Connections = field(default_factory=Connections)
    """To the other ranks of the group."""
    maybe_leaving: Future[None] | None = None
    """The group before, as long as its connections are being closed."""
    maybe_servers: Colocated | StaleServers | None = None
    """Parameter servers in this process, from the first group on."""

    @property
    def may_stay(self) -> bool:
        """Whether this process can leave a group and join another: DistributedDataParallel and NCCL are not known to
        let go of what they hold, with bounded staleness it holds no state that others have come to, and with a model
        that is spread over ranks only a part of one."""
        preset = self.job.preset
        return preset.train.maybe_inexact is None and not preset.parallel.is_spread and self.device.type == "cpu"

    def cut(self) -> None:
        """Whatever this process waits for in its group, it hears that it is over. May be called by another thread."""
        self.connections.cut()
        if self.maybe_servers is not None:
            self.maybe_servers.give_up()


def prepare(job: Job, *, local_rank: int) -> Kit:
    """Raises `UserError` if the recipe here is another than the run's, its model cannot be spread as it is to be, or
    the signing key cannot be used, `DeterministicError` if the recipe gives no model."""
    keyring()  # not only at the first checkpoint
    device = settle_arithmetic(local_rank)
    recipe = load_recipe(job.preset)
    require_same_source(job, recipe)
    state = TrainState(recipe, seed=job.preset.seed, device=device)
    if job.preset.parallel.shard > 1:
        require_shardable(state, device)
    if job.preset.parallel.pipeline > 1:
        require_cut(recipe, state.model, job.preset.parallel, device)
        require_separable(state.optimizer)
    if job.preset.parallel.tensor > 1:
        require_cuttable(recipe, state, job.preset.parallel)
    return Kit(
        job=job,
        device=device,
        recipe=recipe,
        environment=environment.fingerprint(),
        maybe_state=state,
    )


def train(
    kit: Kit,
    seat: Seat,
    record: Record,
    rendezvous: Any,
    handover: Handover | None = None,
    tell: Callable[[Note], None] = lambda note: None,
    *,
    make_events: type[EventWriter] = EventWriter,
) -> None:
    """Train the job's run to its committed result. `record` is the run's as the group began, the same for all ranks;
    `rendezvous` is the group's store; `tell` hears how far it came.

    `handover` holds what the group before left, and takes what this one leaves. Raises `GroupOver` if the process may
    join another group, and else what made it fail; after that, no collective may follow.
    """
    job = kit.job
    state, kit.maybe_state = kit.maybe_state, None
    run = job.open_run()
    servers = _servers(kit, seat, record)
    record = _admitted(run, record, kit.environment)
    _join(kit, seat, rendezvous)
    events = make_events(run.store, run.prefix(record), seat.token) if seat.rank == 0 else None
    feed = Feed(preset=job.preset, location=job.location, dataset_digest=job.dataset_digest)
    patience = job.preset.launch.collective_timeout_seconds / 2
    trainer = _kind_of(job.preset)(
        preset=job.preset,
        recipe=kit.recipe,
        feed=feed,
        initial=job.initial,
        run=run,
        record=record,
        saver=_saver(job, seat, run.prefix(record), rendezvous, events),
        events=events,
        rank=Rank(rank=seat.rank, world_size=seat.world_size, token=seat.token, device=kit.device),
        state=state,
        handover=handover,
        tell=tell,
        crashes=Crashes(feed, local_rank=seat.local_rank, seconds=patience),
        servers=servers,
    )
    try:
        trainer.train()
    except GroupOver:
        if kit.may_stay:
            trainer.let_go()
            kit.maybe_state = trainer.state
            kit.maybe_leaving = beside(dist.destroy_process_group)
        raise
    with trainer.handover.waiting():
        _leave_together(rendezvous, seat)


def _kind_of(preset: Preset) -> Callable[..., Trainer]:
    if preset.parallel.shard > 1:
        return ShardedTrainer
    if preset.parallel.is_spread:
        return ReplicaTrainer
    return StaleTrainer if preset.train.staleness else Trainer


def require_same_source(job: Job, recipe: Recipe) -> None:
    """Raises `UserError` if the recipe here is another one than the run's."""
    weights = job.initial.weights_sha256 if job.initial else None
    if run_key(recipe=recipe, preset=job.preset, dataset_digest=job.dataset_digest, initial_weights=weights) != job.key:
        raise UserError("the recipe's source changed since this run was submitted: start the pipeline again")


def _join(kit: Kit, seat: Seat, rendezvous: Any) -> None:
    """Become a rank of the group."""
    if kit.maybe_leaving is not None:
        wait([kit.maybe_leaving])
    with kit.connections.opening():
        dist.init_process_group(
            _backend(kit.device, seat, rendezvous),
            store=rendezvous,
            rank=seat.rank,
            world_size=seat.world_size,
            timeout=timedelta(seconds=kit.job.preset.launch.collective_timeout_seconds),
        )


def _backend(device: torch.device, seat: Seat, rendezvous: Any) -> str:
    """Gradients on GPUs travel by NCCL; but by gloo if two ranks share one, which NCCL refuses."""
    if device.type == "cpu":
        return "gloo"
    rendezvous.set(f"gpu/{seat.rank}", str(torch.cuda.get_device_properties(device).uuid))
    gpus = {rendezvous.get(f"gpu/{rank}") for rank in range(seat.world_size)}
    return "cpu:gloo,cuda:nccl" if len(gpus) == seat.world_size else "cpu:gloo,cuda:gloo"


def _admitted(run: RunRecord, record: Record, here: dict[str, str]) -> Record:
    """The record that says in which environment the run was begun, and that this is the same.

    Raises `UserError` if it is not; `FencedError` if a newer group owns the run that was in none yet.
    """
    if not record.environment:
        record = run.update(lambda newest: with_environment(newest, here, token=record.token))
    environment.require_same(record.environment, here)
    return record


def _servers(kit: Kit, seat: Seat, record: Record) -> Colocated | StaleServers | None:
    """Raises `UserError` on a GPU."""
    preset = kit.job.preset
    if preset.train.strategy == "parameter_server" and kit.maybe_servers is None:
        if kit.device.type != "cpu":
            raise UserError(
                "train.strategy = 'parameter_server' has servers on processors alone: use 'all_reduce' on GPUs"
            )
        member = record.members[seat.rank // preset.launch.processes_per_node]
        kind = StaleServers if preset.train.staleness else Colocated
        kit.maybe_servers = kind(kit.recipe, preset, address=member.address, secret=record.secret)
    return kit.maybe_servers


def _saver(job: Job, seat: Seat, prefix: str, rendezvous: Any, maybe_events: EventWriter | None) -> CheckpointSaver:
    return CheckpointSaver(
        run=job.open_run(),
        prefix=prefix,
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
