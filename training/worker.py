"""One rank: started by its node's agent, told all by one JSON line on standard input, dead when its agent dies."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from training.documents import canonical_json, parse
from training.errors import UnbrokenError, UserError
from training.job import Job
from training.processes import die_with


@dataclass(frozen=True, kw_only=True)
class WorkerOrder:
    """What the agent tells a worker."""

    job: dict[str, Any]
    token: int
    rank: int
    local_rank: int
    world_size: int
    store_address: str
    store_port: int
    maybe_listen_fd: int | None
    """Only for rank 0: the socket that the agent bound for the group's store."""
    report_path: str
    """Where to say why it failed."""
    agent_pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerReport:
    """Why a worker failed."""

    class_name: str
    message: str
    step: int


def main() -> None:
    order = parse(WorkerOrder, json.loads(sys.stdin.readline()))
    die_with(order.agent_pid)
    step = [0]
    try:
        _train(order, step)
    except Exception as error:  # the agent decides what it means; no more collectives after an error
        if not isinstance(error, UnbrokenError):
            traceback.print_exc()
        report = WorkerReport(class_name=_class_name(error), message=str(error) or repr(error), step=step[0])
        Path(order.report_path).write_bytes(canonical_json(asdict(report)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code if isinstance(error, UnbrokenError) else 1)
    os._exit(0)  # the group's threads need no goodbye


def _class_name(error: Exception) -> str:
    """The class that says who must act; errors of the group's collectives say only that a peer is gone."""
    if isinstance(error, UnbrokenError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == UnbrokenError.__module__)
    import torch.distributed as dist

    peer_is_gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
    return "PeerLost" if peer_is_gone else "Exception"


def _train(order: WorkerOrder, step: list[int]) -> None:
    import torch
    import torch.distributed as dist

    from training import environment
    from training.checkpoint import CheckpointSaver
    from training.data.loader import Feed
    from training.events import EventWriter
    from training.loop import Rank, Trainer
    from training.recipe import load_recipe
    from training.record import run_key, with_environment

    torch.set_num_threads(environment.THREADS_PER_RANK)
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", order.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    job = Job.from_json(order.job)
    recipe = load_recipe(job.preset)
    weights = job.initial.weights_sha256 if job.initial else None
    if run_key(recipe=recipe, preset=job.preset, dataset_digest=job.dataset_digest, initial_weights=weights) != job.key:
        raise UserError("the recipe's source changed since this run was submitted: start the pipeline again")
    run = job.open_run()
    record = run.read()
    record.require_token(order.token)
    here = environment.fingerprint()
    record = run.update(lambda newest: with_environment(newest, here, token=order.token))
    environment.require_same(record.environment, here)

    store = _rendezvous(order)
    timeout = timedelta(seconds=job.preset.launch.collective_timeout_seconds)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=order.rank,
        world_size=order.world_size,
        timeout=timeout,
    )
    events = EventWriter(run.store, run.prefix(record), order.token) if order.rank == 0 else None
    saver = CheckpointSaver(
        run=run,
        rendezvous=store.clone(),
        rank=order.rank,
        world_size=order.world_size,
        token=order.token,
        keep=job.preset.train.keep_checkpoints,
        keep_every_steps=job.preset.train.keep_every_steps,
        before_commit=events.flush if events else lambda: None,
    )
    trainer = Trainer(
        preset=job.preset,
        recipe=recipe,
        feed=Feed(preset=job.preset, location=job.location, dataset_digest=job.dataset_digest),
        initial=job.initial,
        run=run,
        saver=saver,
        events=events,
        rank=Rank(rank=order.rank, world_size=order.world_size, token=order.token, device=device),
    )
    try:
        trainer.train()
    finally:
        step[0] = trainer.state.step
    _leave_together(store, order)


def _rendezvous(order: WorkerOrder) -> Any:
    """The group's own store, on the one socket that its first node's agent bound."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed

    is_master = order.maybe_listen_fd is not None
    return TCPStore(
        order.store_address,
        order.store_port,
        world_size=order.world_size,
        is_master=is_master,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=order.maybe_listen_fd,
    )


def _leave_together(store: Any, order: WorkerOrder) -> None:
    """Rank 0 holds the store: it leaves last, and the others only once the result is committed."""
    if order.rank == 0:
        store.set("result-committed", "1")
        store.wait([f"left/{rank}" for rank in range(1, order.world_size)] or ["result-committed"])
    else:
        store.wait(["result-committed"])
        store.set(f"left/{order.rank}", "1")


if __name__ == "__main__":
    main()
