"""`python -m benchmarks.training.staleness`: how soon a recommender learns if workers may run ahead, in simulated time.

Eight workers and one server: the project's own state machines, and real gradients of the recipe `Clicks` on made-up
clicks. What a step takes is drawn anew each time: one time unit, give or take a fifth, and now and then five; a
message takes a twentieth. The synchronous mode waits for all eight, and makes one step of their mean. Nothing here is
exact but the synchronous row: which update comes first decides the bits.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from benchmarks.power_law import lines
from training.recipe import Record
from training.recipes.pairs import Clicks
from training.servers.protocol import Message, Send
from training.servers.stale_protocol import Fresh, Places
from training.servers.staleness import StaleShard, StaleWorker

RECIPE = Clicks(num_rows=4096, width=16, num_others=7, learning_rate=0.2)
NUM_WORKERS, BATCH = 8, 64
MESSAGE_UNITS, SLOW_UNITS, SLOW_SHARE = 0.05, 5.0, 0.05
BOUNDS = (0, 1, 3, 10)
NUM_TEST = 4096

Gradients = list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Clicked:
    """Samples of the recipe."""

    train: Tensor
    test: Tensor

    def batch(self, worker: int, step: int) -> Tensor:
        start = (step * NUM_WORKERS + worker) * BATCH % (len(self.train) - BATCH)
        return self.train[start : start + BATCH]


def clicked(count: int) -> Clicked:
    samples = [sample["rows"] for line in lines(count) for sample in RECIPE.encode(Record(id="made up:1", data=line))]
    rows = torch.from_numpy(np.stack(samples))
    return Clicked(train=rows[NUM_TEST:], test=rows[:NUM_TEST])


class Model:
    """The parameters that a server has, and its optimizer."""

    def __init__(self, data: Clicked) -> None:
        torch.manual_seed(0)
        self._data = data
        self._model = RECIPE.model()
        for module in (self._model.get_submodule("firsts"), self._model.get_submodule("partners")):
            module.sparse = False  # type: ignore[assignment]  # whole gradients: nothing is sent here
        self._parameters = list(self._model.parameters())
        self._optimizer = RECIPE.optimizer(self._model)

    def apply(self, place: int, update: Gradients) -> None:
        for parameter, gradient in zip(self._parameters, update, strict=True):
            parameter.grad = gradient
        self._optimizer.step()

    def values(self, place: int = 0, clock: int = 0) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def snapshot(self) -> NoReturn:
        raise NotImplementedError("nothing is saved here")

    def gradients(self, values: Sequence[Tensor], worker: int, step: int) -> Gradients:
        """At other values than those that are here."""
        own = [parameter.data for parameter in self._parameters]
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data = value
        loss = RECIPE.loss(self._model, {"rows": self._data.batch(worker, step)})
        found = torch.autograd.grad(loss, self._parameters)
        for parameter, value in zip(self._parameters, own, strict=True):
            parameter.data = value
        return list(found)

    @torch.no_grad()
    def accuracy(self) -> float:
        return float(RECIPE.scores(self._model, {"rows": self._data.test})["accuracy"].mean())


class Paces:
    """What each worker's next step takes, the same for all contestants."""

    def __init__(self) -> None:
        self._draws = [np.random.default_rng(worker) for worker in range(NUM_WORKERS)]

    def units(self, worker: int) -> float:
        draw = self._draws[worker]
        usual = draw.normal(1.0, 0.2)
        return SLOW_UNITS if draw.random() < SLOW_SHARE else max(0.1, float(usual))


@dataclass(frozen=True, kw_only=True)
class Point:
    """How far a contestant has come at a time."""

    units: float
    num_steps: float
    """Of a worker, on average."""
    accuracy: float
    mean_lag: float
    """By how many steps of its reader's own what was read was behind it, of the slowest."""


def synchronous(data: Clicked, times: Sequence[float]) -> Iterator[Point]:
    model, paces = Model(data), Paces()
    now, step = 0.0, 0
    for units in times:
        while now < units:
            values = model.values()
            parts = [model.gradients(values, worker, step) for worker in range(NUM_WORKERS)]
            model.apply(0, [torch.stack(each).mean(dim=0) for each in zip(*parts, strict=True)])
            now += max(paces.units(worker) for worker in range(NUM_WORKERS)) + 2 * MESSAGE_UNITS
            step += 1
        yield Point(units=units, num_steps=step, accuracy=model.accuracy(), mean_lag=0.0)


class Simulation:
    """Workers that may be so many steps ahead."""

    def __init__(self, data: Clicked, bound: int) -> None:
        self._model, self._paces = Model(data), Paces()
        self._shard = StaleShard(self._model, num_places=NUM_WORKERS, bound=bound)
        self._workers = {f"worker {place}": StaleWorker(token=1, shards=["server"]) for place in range(NUM_WORKERS)}
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, str, str, Message | None]] = []
        self._lags: list[int] = []
        self._shard.begin(Places(token=1, workers=tuple(self._workers)))
        for name, worker in self._workers.items():
            self._post(0.0, name, worker.join())

    def points(self, times: Sequence[float]) -> Iterator[Point]:
        for units in times:
            while self._events[0][0] < units:
                self._happen(*heapq.heappop(self._events))
            steps = sum(self._shard.clocks) / NUM_WORKERS
            lag = sum(self._lags) / len(self._lags)
            yield Point(units=units, num_steps=steps, accuracy=self._model.accuracy(), mean_lag=lag)

    def _post(self, now: float, sender: str, sends: Sequence[Send]) -> None:
        for send in sends:
            event = (now + MESSAGE_UNITS, next(self._numbers), sender, send.to, send.message)
            heapq.heappush(self._events, event)

    def _happen(self, now: float, _: int, sender: str, to: str, maybe_message: Message | None) -> None:
        if to == "server":
            assert maybe_message is not None
            self._post(now, to, self._shard.handle(sender, maybe_message))
            return
        worker = self._workers[to]
        if maybe_message is None:
            place = list(self._workers).index(to)
            self._post(now, to, worker.push([self._model.gradients(worker.values[0], place, worker.clock)]))
            return
        self._post(now, to, worker.handle(sender, maybe_message))
        if isinstance(maybe_message, Fresh):
            self._lags.append(worker.clock - min(self._shard.clocks))
            end = now + self._paces.units(list(self._workers).index(to))
            heapq.heappush(self._events, (end, next(self._numbers), to, to, None))


def row(name: str, points: Sequence[Point]) -> str:
    accuracies = " | ".join(f"{point.accuracy:.3f}" for point in points)
    return f"| {name} | {accuracies} | {points[-1].num_steps:.0f} | {points[-1].mean_lag:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=float, default=800)
    parser.add_argument("--lines", type=int, default=120_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = clicked(options.lines)
    times = [options.units * share for share in (0.125, 0.25, 0.5, 1.0)]
    shown = " | ".join(f"after {units:.0f} units" for units in times)
    print(f"| | accuracy {shown} | steps of a worker | behind, on average |")
    print("|" + " --- |" * (len(times) + 3))
    print(row("synchronous", list(synchronous(data, times))), flush=True)
    for bound in BOUNDS:
        print(row(f"at most {bound} ahead", list(Simulation(data, bound).points(times))), flush=True)


if __name__ == "__main__":
    main()
