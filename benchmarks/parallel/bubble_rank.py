"""One stage of a pipeline: some steps, and how long it computed and waited in each."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.parallel.ranks import answer, meet
from benchmarks.parallel.work import CPU, Case, Work, batch_of, pipeline_of, recipe_of
from training.arithmetic.streams import streams_now
from training.checkpoints.state import TrainState
from training.layout import Layout, Schedule
from training.parallel.passing import Passing
from training.parallel.pipeline import Pipeline
from training.parallel.pipelined import PipelinedReducer
from training.parallel.schedule import Pass

NUM_LAYERS = 8
NUM_MESSAGES = 20
NUM_WARM_UP_STEPS = 1


def main() -> None:
    schedule, *numbers = sys.argv[1:]
    num_microbatches, num_steps, width = map(int, numbers)
    rank = meet()
    recipe = recipe_of(width, NUM_LAYERS)
    layout = Layout(pipeline=dist.get_world_size())
    case = Case(name=str(layout), layout=layout, maybe_schedule=cast(Schedule, schedule))
    clock = Clock()
    model = TrainState(recipe, seed=1, device=CPU).model
    pipeline = pipeline_of(case, recipe, model, rank, waiting=clock.waiting)
    reducer = TimedReducer(pipeline, num_extras=1, ranges=[range(num_microbatches)])
    steps = [_step(reducer, clock, Work(recipe)) for _ in range(NUM_WARM_UP_STEPS + num_steps)]
    activations = torch.zeros(*batch_of(recipe, 0)["bytes"][:, 1:].shape, width)
    answer({"steps": steps[NUM_WARM_UP_STEPS:], "message_seconds": _message_seconds(pipeline, activations)})


class Clock:
    """How long this rank waited for others."""

    seconds = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


class TimedReducer(PipelinedReducer):
    """Notes how long the processor took for each pass."""

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.passes: list[tuple[bool, int, int, float]] = []

    def _go_forward(self, one: Pass, *about: Any) -> list[Tensor] | None:
        return self._timed(one, lambda: super(TimedReducer, self)._go_forward(one, *about))

    def _go_back(self, one: Pass, *about: Any) -> list[Tensor] | None:
        return self._timed(one, lambda: super(TimedReducer, self)._go_back(one, *about))

    def _timed(self, one: Pass, go: Callable[[], list[Tensor] | None]) -> list[Tensor] | None:
        started = time.thread_time()
        found = go()
        self.passes.append((one.is_forward, one.chunk, one.microbatch, time.thread_time() - started))
        return found


def _step(reducer: TimedReducer, clock: Clock, work: Work) -> Mapping[str, Any]:
    dist.barrier()
    reducer.passes, clock.seconds = [], 0.0
    started = time.perf_counter()
    reducer.compute(work)
    seconds = time.perf_counter() - started
    reducer.finish()
    return {"seconds": seconds, "waited": clock.seconds, "passes": reducer.passes}


def _message_seconds(pipeline: Pipeline, activations: Tensor) -> float:
    """From the first stage to the second, once it was sent."""
    passing = Passing(pipeline.groups.stages)
    found = []
    for _ in range(NUM_MESSAGES):
        if pipeline.stage == 0:
            passing.send(0, [activations, streams_now(CPU)], stage=1)
        dist.barrier()
        started = time.perf_counter()
        if pipeline.stage == 1:
            passing.receive(0, stage=0)
        found.append(time.perf_counter() - started)
        passing.wait()
        dist.barrier()
    return statistics.median(found)


if __name__ == "__main__":
    main()
