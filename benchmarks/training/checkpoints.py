"""`python -m benchmarks.training.checkpoints`: what saving costs the training thread, the CPU and the steps beside it.

One process; a state of about 160 MB (the weights of a 13M-parameter model and AdamW's moments); a SeaweedFS of the
bench's own on loopback, which takes its CPU from the same two cores.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import urllib3
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from benchmarks.data.contestants import s3
from benchmarks.data.store import make_bucket, running_store
from benchmarks.environments import ENVIRONMENTS
from benchmarks.training.workload import Model, optimizer_of
from training.checkpoints.saver import CheckpointSaver
from training.documents import sha256_hex
from training.runs.record import RunRecord
from training.s3.objectstore import Store, StoreLocation

BUCKET = "checkpoints"
BARE = "bare"
PUT_AND_GET = ("put_object", "get_object")
NUM_STEPS = {0.2: 5, 1.0: 2}
"""At least so many, by their seconds."""
_MATRIX = torch.ones(512, 512)

State = dict[str, Tensor]
Wait = Callable[[], None]
MakeWriter = Callable[[], Any]
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
        prefix = run.prefix(run.update(lambda record: replace(record, token=1)))
        rendezvous = dist.HashStore()  # type: ignore[attr-defined]  # public, but not listed
        self._saver = CheckpointSaver(
            run=run,
            prefix=prefix,
            rendezvous=rendezvous,
            rank=0,
            world_size=1,
            token=1,
            keep=2,
            before_commit=lambda: None,
        )
        self._step = 0

    def __call__(self, state: State) -> Wait:
        self._step += 1
        self._saver.save(self._step, state, on_commit=lambda reference: None)
        return self._saver.wait


class Bare:
    """The floor: a copy into a reused buffer; then its hash, an unsigned PUT and a GET in a thread. Proves nothing."""

    def __init__(self, bucket: str) -> None:
        names = {"Bucket": bucket, "Key": "bare"}
        self._put, self._get = (s3.client().generate_presigned_url(name, Params=names) for name in PUT_AND_GET)
        self._connections = urllib3.PoolManager()
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
        body: Any = self._buffer.data
        sha256_hex(body)
        assert self._connections.request("PUT", self._put, body=body).status == 200
        with self._connections.request("GET", self._get, preload_content=False) as reply:
            assert sum(map(len, reply.stream(1 << 18))) == len(body)


def torch_save(path: Path) -> Save:
    def save(state: State) -> Wait:
        torch.save(state, path)
        return done

    return save


def torch_save_to_s3(bucket: str) -> Save:
    client = s3.client()

    def save(state: State) -> Wait:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        client.put_object(Bucket=bucket, Key="state.pt", Body=file)
        return done

    return save


def dcp_save(make_writer: MakeWriter) -> Save:
    def save(state: State) -> Wait:
        dcp.save(state, storage_writer=make_writer())
        return done

    return save


def dcp_async_save(make_writer: MakeWriter) -> Save:
    """On a gloo group of its own, as it must be beside training's collectives."""
    group = dist.new_group(backend="gloo")

    def save(state: State) -> Wait:
        future: Any = dcp.async_save(state, storage_writer=make_writer(), process_group=group)
        return lambda: future.result() and None

    return save


def done() -> None:
    """There is nothing to wait for."""


def savers_of(bare: Bare, folder: Path, location: StoreLocation) -> dict[str, Save]:
    def on_disk(name: str) -> MakeWriter:
        return lambda: FileSystemWriter(folder / name)

    def on_s3(name: str) -> MakeWriter:
        return lambda: FsspecWriter(f"s3://{BUCKET}/{name}")

    return {
        BARE: bare,
        "**Unbroken** (S3)": Unbroken(location),
        "torch.save (S3)": torch_save_to_s3(BUCKET),
        "dcp.save (S3)": dcp_save(on_s3("dcp")),
        "dcp.async_save (S3)": dcp_async_save(on_s3("async")),
        "torch.save (disk)": torch_save(folder / "state.pt"),
        "dcp.save (disk)": dcp_save(on_disk("dcp")),
        "dcp.async_save (disk)": dcp_async_save(on_disk("async")),
    }


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one save, in seconds: what a memcpy takes beside it, how long the training thread was held, the process's CPU,
    until it was done, and what steps of each length lost."""

    memcpy: float
    held: float
    cpu: float
    whole: float
    lost: dict[float, float]


def measure(save: Save, bare: Bare, state: State, num_products: int) -> Cost:
    memcpy = statistics.median(seconds_of(bare.copy, state) for _ in range(3))
    cpu, started = time.process_time(), time.perf_counter()
    wait = save(state)
    held = time.perf_counter() - started
    wait()
    whole = time.perf_counter() - started
    return Cost(
        memcpy=memcpy,
        held=held,
        cpu=time.process_time() - cpu,
        whole=whole,
        lost={seconds: lost_by_steps(save, state, seconds, num_products) for seconds in NUM_STEPS},
    )


def lost_by_steps(save: Save, state: State, seconds: float, products_per_second: int) -> float:
    """How much longer the steps from the beginning of a save to its end take than without it."""
    num_products = round(seconds * products_per_second)
    calm = statistics.median(seconds_of(compute, num_products) for _ in range(NUM_STEPS[seconds]))
    num_steps = 0
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        saved = pool.submit(save(state))
        while num_steps < NUM_STEPS[seconds] or not saved.done():
            compute(num_products)
            num_steps += 1
        saved.result()
    return time.perf_counter() - started - num_steps * calm


def seconds_of(act: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - started


def compute(num_products: int) -> None:
    """What a step does here."""
    for _ in range(num_products):
        _MATRIX @ _MATRIX


@contextmanager
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        dist.destroy_process_group()


def as_markdown(costs: dict[str, list[Cost]]) -> str:
    """Held, over a memcpy of the state just before; CPU, over the floor's of the same round."""
    lost = " | ".join(f"lost by steps of {seconds} s, ms" for seconds in NUM_STEPS)
    lines = [
        f"| median (min–max) | held, of a memcpy | CPU, of the floor's | until done, s | {lost} |",
        "| --- |" + " --- |" * (3 + len(NUM_STEPS)),
    ]
    for name, found in costs.items():
        cells = [
            _shown([cost.held / cost.memcpy for cost in found]),
            _shown([cost.cpu / floor.cpu for cost, floor in zip(found, costs[BARE], strict=True)]),
            _shown([cost.whole for cost in found]),
            *(_shown([cost.lost[seconds] * 1000 for cost in found], digits=0) for seconds in NUM_STEPS),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float], *, digits: int = 2) -> str:
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.checkpoints", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="some of the contestants, by a part of their names")
    parser.add_argument("--out", type=Path, default=ENVIRONMENTS / "results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
    torch.set_num_threads(1)
    state = make_state()
    num_bytes = sum(t.nbytes for t in state.values())
    with tempfile.TemporaryDirectory(prefix="unbroken-bench-") as name, running_store(Path(name) / "store"), alone():
        make_bucket(BUCKET)
        bare = Bare(BUCKET)
        savers = savers_of(bare, Path(name), StoreLocation(endpoint=os.environ["AWS_ENDPOINT_URL"], bucket=BUCKET))
        wanted = arguments.only or [""]
        names = [name for name in savers if name == BARE or any(part in name for part in wanted)]
        products_per_second = round(100 / seconds_of(compute, 100))
        for name in names:
            savers[name](state)()  # warm up
        costs: dict[str, list[Cost]] = {name: [] for name in names}
        for number in range(arguments.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                costs[name].append(measure(savers[name], bare, state, products_per_second))
            print(f"round {number + 1}/{arguments.rounds}", file=sys.stderr)
    about = {"num_bytes": num_bytes, "cpus": os.cpu_count(), "os": platform.platform(), "torch": torch.__version__}
    document = {**about, "seconds": {name: list(map(asdict, found)) for name, found in costs.items()}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "checkpoints.json").write_text(json.dumps(document, indent=1) + "\n")
    (arguments.out / "checkpoints.md").write_text(as_markdown(costs))
    print(as_markdown(costs))


if __name__ == "__main__":
    main()
