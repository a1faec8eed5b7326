"""`python -m benchmarks.training.tables`: a step of an embedding table on a server, by rows and whole.

One server and one worker, each a process, by the project's own messages over loopback: the worker has the gradient of
some rows; it pushes it, hears the norm, decides, and gets what was changed. Whole and by rows take turns; in the end
both tables must have the same bits. Ratios are of the same round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adagrad

from training.arithmetic.reduce import Subtree
from training.arithmetic.sparse import Rows
from training.servers.arithmetic import TensorState, decide, part_of, put
from training.servers.endpoints import Begun, Remote, Server
from training.servers.layout import shards
from training.servers.mesh import Mesh
from training.servers.protocol import Assignment, Message, Push, Values
from training.servers.replica import Replica
from training.servers.wire import encode

SECRET, HOST, TOKEN = "bench", "127.0.0.1", 1
MAX_BYTES = 1 << 32
CLIP_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Table:
    """Of so many rows; sent by rows or whole."""

    num_rows: int
    width: int
    is_by_rows: bool

    def parameter(self) -> nn.Parameter:
        torch.manual_seed(0)
        return nn.Parameter(torch.randn(self.num_rows, self.width))

    @property
    def shard(self) -> Any:
        tables = {0: self.width} if self.is_by_rows else {}
        return shards([self.num_rows * self.width], 1, tables)[0]


def serve_table(table: Table, connection: Connection) -> None:
    """In a process of its own, until it is killed."""
    torch.set_num_threads(1)
    parameter = table.parameter()
    state = TensorState(Adagrad([parameter], lr=0.1, foreach=False), [parameter], table.shard)
    mesh = Mesh("server", secret=SECRET, address=HOST, max_bytes=MAX_BYTES)
    replica = Replica("server", state, num_virtual_workers=1)
    replica.fill()
    server = Server(mesh, replica)
    connection.send(mesh.address)
    assignment = Assignment(token=TOKEN, primary="server", backups=())
    server.begin(Begun(assignment=assignment, places={"worker": connection.recv()}))
    threading.Event().wait()


class Contestant:
    """A worker in this process, and the server that has the table."""

    def __init__(self, table: Table) -> None:
        self.table = table
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._server = context.Process(target=serve_table, args=(table, theirs), daemon=True)
        self._server.start()
        mesh = Mesh("worker", secret=SECRET, address=HOST, max_bytes=MAX_BYTES)
        places = {"server": ours.recv()}
        ours.send(mesh.address)
        choose = partial(decide, clip_norm=CLIP_NORM, learning_rate_scale=1.0)
        self._remote = Remote(mesh, token=TOKEN, primaries=["server"], places=places, decide=choose)
        self._remote.pull()
        self._step = 0

    @cached_property
    def values(self) -> Tensor:
        return self.table.parameter().detach()

    def step(self, rows: Rows) -> tuple[float, int]:
        """Seconds, and bytes both ways."""
        gradient: Tensor | Rows = rows
        if not self.table.is_by_rows:
            gradient = torch.zeros_like(self.values)
            gradient[rows.numbers] = rows.values
        self._step += 1
        own, shard = self.values, self.table.shard
        started = time.perf_counter()
        parts = ((Subtree(0, 1), part_of({0: gradient}, shard, [torch.zeros(8)])),)
        _, (answer,) = self._remote.step(self._step, [parts])
        put(answer, shard, [own])
        seconds = time.perf_counter() - started
        push = Push(token=TOKEN, step=self._step, parts=parts)
        return seconds, num_bytes(push) + num_bytes(Values(token=TOKEN, step=self._step, values=answer))

    def close(self) -> None:
        self._server.kill()
        self._server.join()


def num_bytes(message: Message) -> int:
    head, buffers = encode(message)
    return len(head) + sum(map(len, buffers))


def some_rows(table: Table, density: float, seed: int) -> Rows:
    chance = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(table.num_rows, generator=chance)[: round(density * table.num_rows)].sort().values
    return Rows(numbers=numbers, values=torch.randn(len(numbers), table.width, generator=chance))


def compare(whole: Contestant, by_rows: Contestant, *, density: float, num_rounds: int) -> str:
    """One line of the table."""
    found: list[tuple[tuple[float, int], tuple[float, int]]] = []
    for number in range(num_rounds + 1):
        rows = some_rows(whole.table, density, seed=number)
        found.append((whole.step(rows), by_rows.step(rows)))
    times = [dense / sparse for (dense, _), (sparse, _) in found[1:]]  # the first one meets new memory
    (dense_seconds, dense_bytes), (sparse_seconds, sparse_bytes) = (
        [statistics.median(numbers) for numbers in zip(*side, strict=True)] for side in zip(*found[1:], strict=True)
    )
    return (
        f"| {density:.2%} | {dense_bytes / 1e6:.1f} MB, {dense_seconds * 1e3:.0f} ms"
        f" | {sparse_bytes / 1e6:.2f} MB, {sparse_seconds * 1e3:.1f} ms | {dense_bytes / sparse_bytes:.0f}"
        f" | {statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f}) |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.01, 0.001])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    whole, by_rows = (
        Contestant(Table(num_rows=options.rows, width=options.width, is_by_rows=is_by_rows))
        for is_by_rows in (False, True)
    )
    print("| rows looked up | whole table | rows alone | fewer bytes | faster, median (min–max) |")
    print("| --- | --- | --- | --- | --- |")
    for density in options.densities:
        print(compare(whole, by_rows, density=density, num_rounds=options.rounds), flush=True)
    if not torch.equal(whole.values, by_rows.values):
        raise SystemExit("the tables differ")
    print("Both tables have the same bits.")
    for contestant in (whole, by_rows):
        contestant.close()


if __name__ == "__main__":
    main()
