"""This library's servers, by its own messages: two phases, the norm, the decision, and backups, as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.servers.pushes import (
    NUM_VARIANTS,
    WIDTH,
    Case,
    Deal,
    Gradient,
    Seat,
    optimizer_of,
    take_seat,
    wait_until_killed,
)
from training.arithmetic.reduce import Subtree
from training.arithmetic.sparse import Rows
from training.servers.arithmetic import TensorState, decide, part_of, put
from training.servers.endpoints import Begun, Remote, Server
from training.servers.layout import Shard, shards
from training.servers.mesh import Address, Mesh
from training.servers.protocol import Assignment
from training.servers.replica import Replica

LOOPBACK, EVERYWHERE = "127.0.0.1", "0.0.0.0"
"""Who listens everywhere has no name for the address that it is reached by, and is taken for another host's."""
SECRET, TOKEN = "bench", 1
MAX_BYTES = 1 << 32
CLIP_NORM = 1e9
"""The norm is found out, and is less."""
NUM_EXTRAS = 8

Places = Mapping[str, Address]


def shards_of(case: Case, deal: Deal) -> Sequence[Shard]:
    return shards([case.num_rows * WIDTH], deal.num_servers, {0: WIDTH} if case.is_sparse else {})


def holders(deal: Deal) -> list[list[int]]:
    """Ranks that hold each shard, the primary first."""
    num_hosts = deal.num_processes - deal.num_workers
    return [
        [deal.num_workers + (shard + replica) % num_hosts for replica in range(deal.num_replicas)]
        for shard in range(deal.num_servers)
    ]


def mesh_of(deal: Deal, name: str) -> Mesh:
    address = LOOPBACK if deal.way == "memory" else EVERYWHERE
    return Mesh(name, secret=SECRET, address=address, max_bytes=MAX_BYTES)


def server_name(number: int, shard: int, holder: int) -> str:
    return f"server {number} {shard} {holder}"


def host(seat: Seat, number: int, shard: int) -> tuple[Mesh, Callable[[Places], None]]:
    """One replica, and how it is told where all others are."""
    case, ranks = seat.deal.cases[number], holders(seat.deal)[shard]
    parameter = case.parameter()
    state = TensorState(optimizer_of(parameter), [parameter], shards_of(case, seat.deal)[shard])
    mesh = mesh_of(seat.deal, server_name(number, shard, seat.rank))
    replica = Replica(mesh.name, state, num_virtual_workers=seat.deal.num_workers)
    replica.fill()
    primary, *backups = [server_name(number, shard, holder) for holder in ranks]
    server = Server(mesh, replica)

    def begin(places: Places) -> None:
        assignment = Assignment(token=TOKEN, primary=primary, backups=tuple(backups))
        server.begin(Begun(assignment=assignment, places=places))

    return mesh, begin


class Worker:
    def __init__(self, seat: Seat, number: int, mesh: Mesh, places: Places) -> None:
        case = seat.deal.cases[number]
        self._gradients = [_whole_or_rows(case, case.gradient(seat.rank, n)) for n in range(NUM_VARIANTS)]
        self._subtree = Subtree(seat.rank, 1)
        self._shards = shards_of(case, seat.deal)
        self._parameter = case.parameter().detach()
        self._extras = torch.zeros(NUM_EXTRAS)
        self._remote = Remote(
            mesh,
            token=TOKEN,
            primaries=[server_name(number, shard, ranks[0]) for shard, ranks in enumerate(holders(seat.deal))],
            places=places,
            decide=partial(decide, clip_norm=CLIP_NORM, learning_rate_scale=1.0),
        )
        self._step = 0

    def step(self, variant: int) -> None:
        self._step += 1
        gradient = self._gradients[variant]
        parts = [
            [(self._subtree, part_of({0: gradient}, shard, () if number else (self._extras,)))]
            for number, shard in enumerate(self._shards)
        ]
        _, answers = self._remote.step(self._step, parts)
        for shard, values in zip(self._shards, answers, strict=True):
            put(values, shard, [self._parameter])

    def values(self) -> Sequence[Tensor]:
        return [self._parameter]


def _whole_or_rows(case: Case, gradient: Gradient) -> Tensor | Rows:
    return Rows(numbers=gradient.numbers, values=gradient.values) if case.is_sparse else gradient.values


def main() -> None:
    seat = take_seat()
    numbers = range(len(seat.deal.cases))
    meshes = [mesh_of(seat.deal, f"worker {number} {seat.rank}") for number in numbers if seat.is_worker]
    held = [shard for shard, ranks in enumerate(holders(seat.deal)) if seat.rank in ranks]
    hosted = [host(seat, number, shard) for number in numbers for shard in held]
    told = seat.told_by_all({mesh.name: (LOOPBACK, mesh.address[1]) for mesh in [*meshes, *(one for one, _ in hosted)]})
    places = {name: place for one in told for name, place in one.items()}
    for _, begin in hosted:
        begin(places)
    if seat.is_worker:
        seat.answer(lambda number: Worker(seat, number, meshes[number], places))
    wait_until_killed()


if __name__ == "__main__":
    main()
