"""`python -m benchmarks.training.straggling`: real ranks of which some are slow, with bounded staleness and without.

Four ranks with a server each, the smallest workload of `make bench`, without a store. What a step takes a rank is slept
on top of its gradients, so that it hangs on no processor: `PACE_SECONDS`, and more if it is slow. Who is slow when is
drawn once, the same for all modes. The loss is that of the last steps, of samples that all modes have seen equally
often. Without a checkpoint in between, the bench's barriers are those of every `ROUND_STEPS` steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.training.contestants.unbroken import CPU, Bench, MemoryFeed, preset_of
from benchmarks.training.workload import Workload
from training.arithmetic.objective import fill_new_memory
from training.checkpoints.saver import CheckpointSaver
from training.data.stream import Microbatch
from training.loop import Trainer
from training.runs.events import Entry, EventWriter
from training.runs.record import Record, RunRecord
from training.servers.colocated import Colocated
from training.servers.stale_ranks import StaleServers
from training.stale_loop import Round, StaleTrainer
from training.step import Rank

NUM_RANKS, SIZE = 4, "0.5M"
PACE_SECONDS, ROUND_STEPS, NUM_LAST = 0.05, 50, 20
STEADY, SELDOM, SELDOM_SHARE = 2.0, 5.0, 0.1
BOUNDS = (1, 4, 16)
Situation = Literal["nobody", "one rank in each step", "each rank now and then"]
SITUATIONS: tuple[Situation, ...] = ("nobody", "one rank in each step", "each rank now and then")


def slowness(situation: Situation, rank: int, step: int) -> float:
    """How many times as long that step takes that rank."""
    if situation == "one rank in each step":
        return STEADY if rank == 0 else 1.0
    is_slow = situation != "nobody" and np.random.default_rng([rank, step]).random() < SELDOM_SHARE
    return SELDOM if is_slow else 1.0


@dataclass(frozen=True)
class SlowFeed(MemoryFeed):
    """Sleeps before a rank's first microbatch of a step."""

    situation: Situation

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        for batch in super().microbatches(workers=workers, step=step):
            if batch.worker == workers[0]:
                time.sleep(PACE_SECONDS * slowness(self.situation, self.workload.rank, batch.step))
            yield batch


class Losses:
    """Stands in for the events, and for a saver that is never due."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def add_again(self, entry: Entry) -> None:
        self.found.append(entry.values["loss"])

    def is_settled(self, patience_seconds: float) -> bool:
        return True


def train(rank: int, rendezvous: str, bound: int, situation: Situation, num_steps: int, results: Any) -> None:
    """In a process of its own. Bound 0 is the synchronous mode."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    fill_new_memory(False)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_RANKS)
    workload = Workload(size=SIZE, rank=rank, world_size=NUM_RANKS)
    preset = preset_of(workload, "exact", num_replicas=1)
    preset = replace(
        preset,
        train=replace(preset.train, staleness=bound, checkpoint_every_steps=ROUND_STEPS),
        launch=replace(preset.launch, balance_seconds=0.0),
    )
    losses = Losses()
    settings: dict[str, Any] = {
        "preset": preset,
        "recipe": Bench(workload=workload),
        "feed": SlowFeed(workload, situation),
        "run": cast(RunRecord, None),
        "record": Record(key="bench"),
        "saver": cast(CheckpointSaver, losses),
        "events": cast(EventWriter, losses),
        "rank": Rank(rank=rank, world_size=NUM_RANKS, token=1, device=CPU),
    }
    steps = ahead(settings, losses) if bound else together(settings, losses)
    next(steps)
    dist.barrier()
    started = time.perf_counter()
    for _ in range(num_steps // ROUND_STEPS):
        next(steps)
    dist.barrier()
    if rank == 0:
        results.put((num_steps / (time.perf_counter() - started), float(np.mean(losses.found[-NUM_LAST:]))))
    dist.barrier()


def together(settings: dict[str, Any], losses: Losses) -> Iterator[None]:
    """Rounds of steps in the synchronous mode."""
    servers = Colocated(settings["recipe"], settings["preset"], address="127.0.0.1", secret="bench")
    trainer = Trainer(**settings, servers=servers)
    servers.can_go_on(None, nodes=range(NUM_RANKS))
    servers.begin(trainer.state, token=1, rank=settings["rank"].rank)
    while True:
        yield
        for _ in range(ROUND_STEPS):
            losses.found.append(trainer.train_step().loss)


def ahead(settings: dict[str, Any], losses: Losses) -> Iterator[None]:
    """Rounds in which ranks may be ahead."""
    servers = StaleServers(settings["recipe"], settings["preset"], address="127.0.0.1", secret="bench")
    trainer = StaleTrainer(**settings, servers=servers)
    servers.begin(trainer.state, token=1, rank=settings["rank"].rank, world_size=NUM_RANKS)
    while True:
        yield
        trainer.round = Round(trainer.state.model)
        trainer.go_to_barrier()
        trainer.meet()


def measured(bound: int, situation: Situation, num_steps: int) -> tuple[float, float]:
    """Steps per second, and the loss in the end."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "rendezvous"), bound, situation, num_steps, results)
        ranks = [context.Process(target=train, args=(rank, *arguments)) for rank in range(NUM_RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
        found: tuple[float, float] = results.get()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print("| who is slow | synchronous | " + " | ".join(f"at most {bound} ahead" for bound in BOUNDS) + " |")
    print("|" + " --- |" * (2 + len(BOUNDS)))
    for situation in SITUATIONS:
        rows = [measured(bound, situation, options.steps) for bound in (0, *BOUNDS)]
        cells = " | ".join(f"{pace:.1f} steps/s, loss {loss:.2f}" for pace, loss in rows)
        print(f"| {situation} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
