"""`python -m benchmarks.servers.rank WAY MEGABYTES SERVERS REPLICAS`: one of two ranks that add up a vector, again and
again. `RANK` and `RENDEZVOUS` (a file) are in the environment; `benchmarks.servers.transport` tells it how often."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.arithmetic.reduce import Subtree, fold
from training.servers.endpoints import Begun, Remote, Server
from training.servers.mesh import Mesh
from training.servers.protocol import Assignment
from training.servers.replica import Replica

NUM_RANKS = 2
MEGABYTE = 1_000_000
LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
"""Who listens everywhere has no name for the address that it is reached by, and is taken for another host's."""


class SumState:
    """A shard that is what was last added up, as after an all-reduce."""

    def __init__(self) -> None:
        self.step = 0
        self._sum = torch.empty(0)

    def fold(self, parts: list[tuple[Subtree, Tensor]]) -> Tensor:
        return fold([subtree for subtree, _ in parts], [part for _, part in parts])

    def with_said(self, total: Tensor, said: Any) -> Tensor:
        raise NotImplementedError("all compute")

    def report(self, total: Tensor) -> None: ...

    def apply(self, total: Tensor, decision: Any) -> None:
        self._sum = total
        self.step += 1

    def values(self) -> Tensor:
        return self._sum

    changes = values

    def snapshot(self) -> Tensor:
        return self._sum

    def load(self, snapshot: Tensor, step: int) -> None:
        raise NotImplementedError("all are in step")


def all_reduce(flat: Tensor) -> Iterator[None]:
    while True:
        dist.all_reduce(flat)
        yield


def push_and_pull(flat: Tensor, way: str, num_servers: int, num_replicas: int) -> Iterator[None]:
    remote = _met(dist.get_rank(), way, num_servers, num_replicas, max_bytes=4 * flat.nbytes)
    shards = flat.tensor_split(num_servers)
    own = Subtree(dist.get_rank(), 1)
    step = 0
    while True:
        step += 1
        _, found = remote.step(step, [[(own, shard)] for shard in shards])
        for shard, values in zip(shards, found, strict=True):
            if shard.data_ptr() != values.data_ptr():
                shard.copy_(values)
        yield


def _met(rank: int, way: str, num_servers: int, num_replicas: int, *, max_bytes: int) -> Remote:
    """The shards are dealt out to the ranks, and their backups to the others."""
    address = LOOPBACK if way == "memory" else EVERYWHERE

    here: dict[str, Mesh] = {}

    def mesh(name: str) -> Mesh:
        return Mesh(name, secret="bench", address=address, max_bytes=max_bytes, here=here)

    worker = mesh(f"worker {rank}")
    holders = [[(shard + n) % NUM_RANKS for n in range(num_replicas)] for shard in range(num_servers)]
    servers = {shard: _server(mesh(f"server {shard} {rank}")) for shard, ranks in enumerate(holders) if rank in ranks}
    own = {one.name: (LOOPBACK, one.address[1]) for one in (worker, *(server.mesh for server in servers.values()))}
    told: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(told, own)
    places = {name: place for one in told for name, place in one.items()}
    names = [[f"server {shard} {holder}" for holder in ranks] for shard, ranks in enumerate(holders)]
    for shard, server in servers.items():
        primary, *backups = names[shard]
        assignment = Assignment(token=1, primary=primary, backups=tuple(backups))
        server.begin(Begun(assignment=assignment, places=places))
    return Remote(worker, token=1, primaries=[one[0] for one in names], places=places, decide=lambda reports: None)


def _server(mesh: Mesh) -> Server:
    replica = Replica(mesh.name, SumState(), num_virtual_workers=NUM_RANKS)
    replica.fill()
    return Server(mesh, replica)


def require_sums(flat: Tensor, begin: Callable[[], Iterator[None]]) -> Iterator[None]:
    """Once, that what is measured adds up."""
    flat.fill_(dist.get_rank() + 1.0)
    steps = begin()
    next(steps)
    assert torch.equal(flat, torch.full_like(flat, 3.0))
    dist.barrier()  # a server may keep the sum where this rank's part lay, and the other one have yet to hear it
    flat.zero_()
    return steps


def main() -> None:
    way, megabytes, num_servers, num_replicas = sys.argv[1], *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["RENDEZVOUS"], NUM_RANKS)  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=NUM_RANKS)
    flat = torch.empty(megabytes * MEGABYTE // 4)
    steps = require_sums(
        flat,
        lambda: all_reduce(flat) if way == "gloo" else push_and_pull(flat, way, num_servers, num_replicas),
    )
    for line in sys.stdin:
        dist.barrier()
        started = time.perf_counter()
        for _ in range(int(line)):
            next(steps)
        print(json.dumps(time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
