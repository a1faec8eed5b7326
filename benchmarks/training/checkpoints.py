"""`python -m benchmarks.training.checkpoints`: what saving costs the training thread, the CPU and the steps beside it.

One process; a state of about 160 MB (the weights of a 13M-parameter model and AdamW's moments); a SeaweedFS of the
bench's own on loopback, which takes its CPU from the same two cores.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp

from benchmarks.data.contestants import s3
from benchmarks.data.store import make_bucket, running_store
from benchmarks.training.workload import Model, optimizer_of
from training.checkpoint import CheckpointSaver
from training.documents import sha256_hex
from training.objectstore import Store, StoreLocation
from training.record import RunRecord

BUCKET = "checkpoints"
STEP_SECONDS = (0.2, 1.0)
NUM_STEPS = {0.2: 12, 1.0: 4}
MATRIX = 512

State = dict[str, Tensor]
Wait = Callable[[], None]
Save = Callable[[State], Wait]
"""Begins to save, and returns how to wait for the end."""


def make_state() -> State:
    model = Model(512)
    optimizer = optimizer_of(model)
    model(torch.zeros(2, 65, dtype=torch.uint8)).backward()
    optimizer.step()
    found = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items() if value.dim()}
    return found


class Unbroken:
    """This library: one copy into a reused buffer, then PUT, read back and commit in a thread."""

    def __init__(self, location: StoreLocation) -> None:
        run = RunRecord(Store(location), uuid.uuid4().hex)
        run.create_if_missing()
        run.update(lambda record: replace(record, token=1))
        rendezvous = dist.HashStore()  # type: ignore[attr-defined]  # public, but not listed
        self._saver = CheckpointSaver(
            run=run, rendezvous=rendezvous, rank=0, world_size=1, token=1, keep=2, before_commit=lambda: None
        )
        self._step = 0

    def __call__(self, state: State) -> Wait:
        self._step += 1
        self._saver.save(self._step, state, on_commit=lambda reference: None)
        return self._saver.wait


class Bare:
    """The floor: a copy into a reused buffer; then its hash, PUT and GET in a thread, and nothing proven."""

    def __init__(self, bucket: str) -> None:
        self._client = s3.client()
        self._bucket = bucket
        self._buffer = np.zeros(0, dtype=np.uint8)
        self._pool = ThreadPoolExecutor(1)

    def __call__(self, state: State) -> Wait:
        self.copy(state)
        return self._pool.submit(self._send).result

    def copy(self, state: State) -> None:
        size = sum(t.nbytes for t in state.values())
        if len(self._buffer) != size:
            self._buffer = np.zeros(size, dtype=np.uint8)
        start = 0
        for tensor in state.values():
            np.copyto(self._buffer[start : start + tensor.nbytes], tensor.reshape(-1).view(torch.uint8).numpy())
            start += tensor.nbytes

    def _send(self) -> None:
        body: Any = self._buffer.tobytes()
        sha256_hex(body)
        self._client.put_object(Bucket=self._bucket, Key="bare", Body=body)
        self._client.get_object(Bucket=self._bucket, Key="bare")["Body"].read()


def torch_save_to_disk(folder: Path) -> Save:
    def save(state: State) -> Wait:
        torch.save(state, folder / "state.pt")
        return lambda: None

    return save


def torch_save_to_s3(bucket: str) -> Save:
    client = s3.client()

    def save(state: State) -> Wait:
        file = io.BytesIO()
        torch.save(state, file)
        client.put_object(Bucket=bucket, Key="state.pt", Body=file.getvalue())
        return lambda: None

    return save


def dcp_save(folder: Path) -> Save:
    def save(state: State) -> Wait:
        dcp.save(state, checkpoint_id=folder / "dcp")
        return lambda: None

    return save


def dcp_async_save(folder: Path) -> Save:
    """On a gloo group of its own, as it must be beside training's collectives."""
    group = dist.new_group(backend="gloo")

    def save(state: State) -> Wait:
        future: Any = dcp.async_save(state, checkpoint_id=folder / "async", process_group=group)
        return lambda: future.result() and None

    return save


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one save: seconds that the training thread was held, CPU seconds in all, and what it added to the steps."""

    blocking: float
    cpu: float
    inflation: dict[float, float]


def measure(save: Save, state: State) -> Cost:
    save(state)()  # warm up
    cpu, started = time.process_time(), time.perf_counter()
    wait = save(state)
    blocking = time.perf_counter() - started
    wait()
    cpu = time.process_time() - cpu
    return Cost(
        blocking=blocking, cpu=cpu, inflation={seconds: _inflation(save, state, seconds) for seconds in STEP_SECONDS}
    )


def _inflation(save: Save, state: State, seconds: float) -> float:
    """The steps' time with a save at their beginning, over that without, minus 1, in steps."""
    num_products = max(1, round(seconds / _seconds_of(1)))
    calm = sum(_seconds_of(num_products) for _ in range(NUM_STEPS[seconds]))
    started = time.perf_counter()
    wait = save(state)
    for _ in range(NUM_STEPS[seconds]):
        _seconds_of(num_products)
    busy = time.perf_counter() - started
    wait()
    return (busy - calm) / (calm / NUM_STEPS[seconds])


def _seconds_of(num_products: int) -> float:
    """A step that only computes."""
    matrix = torch.ones(MATRIX, MATRIX)
    started = time.perf_counter()
    for _ in range(num_products):
        matrix @ matrix
    return time.perf_counter() - started


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_markdown(costs: dict[str, list[Cost]], copies: list[float]) -> str:
    """Medians over the rounds; blocking as a ratio to the copy, CPU as a ratio to the floor's of the same round."""
    lines = [
        "| median (min–max) | held, of a memcpy | CPU, of the floor's | steps of 0.2 s lost | steps of 1 s lost |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in costs.items():
        held = [cost.blocking / copy for cost, copy in zip(found, copies, strict=True)]
        cpu = [cost.cpu / bare.cpu for cost, bare in zip(found, costs["bare"], strict=True)]
        lost = [[cost.inflation[seconds] for cost in found] for seconds in STEP_SECONDS]
        lines.append(f"| {name} | " + " | ".join(map(_shown, (held, cpu, *lost))) + " |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.checkpoints", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    state = make_state()
    print(f"{sum(t.nbytes for t in state.values()) / 1e6:.0f} MB", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="unbroken-bench-") as name, running_store(Path(name) / "store"), alone():
        folder = Path(name)
        make_bucket(BUCKET)
        location = StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=BUCKET)
        bare = Bare(BUCKET)
        bare.copy(state)
        savers: dict[str, Save] = {
            "bare": bare,
            "**Unbroken** (S3)": Unbroken(location),
            "torch.save (disk)": torch_save_to_disk(folder),
            "torch.save (S3)": torch_save_to_s3(BUCKET),
            "dcp.save (disk)": dcp_save(folder),
            "dcp.async_save (disk)": dcp_async_save(folder),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in savers}
        copies: list[float] = []
        for number in range(rounds):
            started = time.perf_counter()
            bare.copy(state)
            copies.append(time.perf_counter() - started)
            names = list(savers)
            for saver in names[number % len(names) :] + names[: number % len(names)]:
                costs[saver].append(measure(savers[saver], state))
            print(f"round {number + 1}/{rounds}  {threading.active_count()} threads", file=sys.stderr)
        print(as_markdown(costs, copies))


if __name__ == "__main__":
    main()
