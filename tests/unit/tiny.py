"""The smallest run that uses everything a step changes: weights, float and counting buffers, dropout, AdamW, clipping.

The model is a sum of products, not a matrix multiplication, so that its bits do not hang on a BLAS library's choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from training.checkpoints.saver import CheckpointSaver
from training.config import DataConfig, LaunchConfig, Preset, TrainConfig
from training.data.order import Order
from training.data.reader import Rows
from training.data.stream import Microbatch
from training.loop import Trainer
from training.memory.handover import Handover
from training.recipe import Recipe, Record, Sample
from training.runs.events import EventWriter
from training.runs.record import Record as RunsRecord
from training.runs.record import RunRecord
from training.servers.colocated import Colocated
from training.step import Rank

NUM_CLASSES = 3
NUM_INPUTS = 5
CPU = torch.device("cpu")


class TinyModel(nn.Module):
    """[batch, 5] to [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(NUM_INPUTS)
        self.dropout = nn.Dropout(0.25)
        self.weight = nn.Parameter(torch.randn(NUM_CLASSES, NUM_INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.norm(x))
        return (hidden.unsqueeze(1) * self.weight).sum(dim=2)


@dataclass(frozen=True, kw_only=True)
class Tiny(Recipe):
    """Records are lines of five numbers and a label."""

    learning_rate: float = 0.05
    scale: float = 1.0
    is_level: bool = False
    """Whether the learning rate is the same at every step, however many there are."""

    def encode(self, record: Record) -> Iterable[Sample]:
        *inputs, label = (float(text) for text in record.data.split(b","))
        if len(inputs) != NUM_INPUTS:
            raise ValueError(f"expected {NUM_INPUTS} numbers and a label")
        yield {"x": np.array(inputs, dtype=np.float32), "label": np.array(label, dtype=np.int64)}

    def model(self) -> nn.Module:
        return TinyModel()

    def inputs(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["x"] * self.scale

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(self.inputs(batch)), batch["label"])

    def scores(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(model(self.inputs(batch)), batch["label"], reduction="none")}

    def optimizer(self, model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=self.learning_rate, foreach=False)

    def learning_rate_scale(self, step: int, num_steps: int) -> float:
        return 1.0 if self.is_level else (step + 1) / num_steps


class MemoryReader:
    """Stands in for a dataset: columns in memory, made by arithmetic."""

    def __init__(self, columns: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def read(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> tuple[list[str], dict[str, np.ndarray[Any, Any]]]:
        return [f"memory:{index}#0" for index in indices], {name: c[indices] for name, c in self._columns.items()}


@dataclass(frozen=True)
class MemoryHeldOut:
    reader: MemoryReader

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Sequence[int]) -> Rows:
        ids, fields = self.reader.read(np.asarray(indices))
        return Rows(ids=ids, fields=fields)


@dataclass(frozen=True)
class MemoryFeed:
    """Gives the microbatches of a dataset in memory, in the true order, and the same samples as held out."""

    reader: MemoryReader
    preset: Preset

    def held_out(self) -> MemoryHeldOut:
        return MemoryHeldOut(self.reader)

    def microbatches(self, *, workers: Sequence[int], step: int) -> Iterator[Microbatch]:
        train = self.preset.train
        order = Order((len(self.reader),), self.preset.seed, train.batch_size, train.virtual_workers, 1)
        for number in range(step, 1 << 30):
            for worker in workers:
                ids, fields = self.reader.read(order.samples(worker, step=number)[0])
                yield Microbatch(step=number, worker=worker, ids=ids, fields=fields)


def tiny_reader(num_samples: int = 37) -> MemoryReader:
    numbers = np.arange(num_samples * NUM_INPUTS, dtype=np.int64) * 7919 % 101
    inputs = (numbers.astype(np.float32) / 101 - 0.5).reshape(num_samples, NUM_INPUTS)
    return MemoryReader({"x": inputs, "label": np.arange(num_samples, dtype=np.int64) * 5 % NUM_CLASSES})


def tiny_preset(*, steps: int = 6, **train: Any) -> Preset:
    settings = {"batch_size": 20, "virtual_workers": 5, "clip_norm": 0.5, "checkpoint_every_steps": 2, **train}
    return Preset(
        name="tiny",
        recipe="tests.unit.tiny:Tiny",
        data=DataConfig(name="tiny", source="tiny.csv", format="csv"),
        train=TrainConfig(steps=steps, **settings),
        launch=LaunchConfig(nodes=1),
        seed=7,
    )


def stale_preset(*, staleness: int = 2, steps: int = 6, **train: Any) -> Preset:
    """With servers; 0: the synchronous mode of the same."""
    preset = tiny_preset(steps=steps, **train)
    return replace(
        preset,
        train=replace(preset.train, strategy="parameter_server", staleness=staleness),
        launch=replace(preset.launch, server_replicas=1),
    )


class NeverBusy:
    """A saver that saves nothing."""

    def is_settled(self, patience_seconds: float) -> bool:
        return True


def make_trainer(
    *,
    preset: Preset | None = None,
    recipe: Recipe | None = None,
    reader: MemoryReader | None = None,
    rank: int = 0,
    world_size: int = 1,
    run: RunRecord | None = None,
    saver: CheckpointSaver | None = None,
    events: EventWriter | None = None,
    token: int = 1,
    handover: Handover | None = None,
    servers: Colocated | None = None,
    kind: type[Trainer] = Trainer,
) -> Trainer:
    """A trainer that can step; with `run`, `saver` and `events` it can also resume, save and finish."""
    preset = preset or tiny_preset()
    return kind(
        preset=preset,
        recipe=recipe or Tiny(),
        feed=MemoryFeed(reader or tiny_reader(), preset),
        run=cast(RunRecord, run),
        record=run.read() if run else RunsRecord(key="tiny"),
        saver=saver or cast(CheckpointSaver, NeverBusy()),
        events=events,
        rank=Rank(rank=rank, world_size=world_size, token=token, device=CPU),
        handover=handover,
        servers=servers,
    )


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """One thread and deterministic algorithms, as in a worker; then as it was before."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
