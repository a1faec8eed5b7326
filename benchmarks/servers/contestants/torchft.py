"""torchft's prototype of a parameter server: a session with each worker, whose group of two broadcasts to and fro."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torchft.parameter_server import ParameterServer
from torchft.process_group import ProcessGroupGloo

from benchmarks.servers.contestants.shard import Shard, parts_of
from benchmarks.servers.pushes import NUM_VARIANTS, WIDTH, Case, Seat, take_seat, wait_until_killed

SERVER, CLIENT = 0, 1
TIMEOUT = timedelta(hours=1)
"""A server waits for a push while others have their turn, and ends the session if none comes."""


class Server(ParameterServer):  # type: ignore[misc]  # not installed where types are checked
    """One shard of one case."""

    def __init__(self, case: Case, part: range, num_workers: int) -> None:
        self._case = case
        self._num_rows = len(part)
        self._shard = Shard(case, part)
        self._all_are_there = threading.Barrier(num_workers, action=self._shard.step)
        super().__init__(port=0)

    @classmethod
    def new_process_group(cls) -> Any:
        return ProcessGroupGloo(timeout=TIMEOUT)

    def forward(self, session_id: str, pg: Any) -> None:
        """In a thread of its own for each worker, until that is gone."""
        memory = torch.empty(0 if self._case.is_sparse else self._num_rows, WIDTH)
        while True:
            if self._case.is_sparse:
                rows, values = receive_rows(pg, CLIENT)
                self._shard.add(torch.sparse_coo_tensor(rows[None], values, (self._num_rows, WIDTH)))
            else:
                pg.broadcast_one(memory, CLIENT).wait()
                self._shard.add(memory)
            self._all_are_there.wait()
            for work in send(pg, self._shard.changed, SERVER, is_sparse=self._case.is_sparse):
                work.wait()


def send(group: Any, tensors: Sequence[Tensor], root: int, *, is_sparse: bool) -> list[Any]:
    """Rows after how many they are."""
    counted = [torch.tensor([len(tensors[0])]), *tensors] if is_sparse else tensors
    return [group.broadcast_one(tensor, root) for tensor in counted]


def receive_rows(group: Any, root: int) -> tuple[Tensor, Tensor]:
    count = torch.empty(1, dtype=torch.int64)
    group.broadcast_one(count, root).wait()
    rows, values = torch.empty(int(count), dtype=torch.int64), torch.empty(int(count), WIDTH)
    for tensor in (rows, values):
        group.broadcast_one(tensor, root).wait()
    return rows, values


class Worker:
    """With a session with each server."""

    def __init__(self, seat: Seat, number: int, addresses: Sequence[str]) -> None:
        self._case = seat.deal.cases[number]
        parts = seat.deal.parts(self._case)
        self._groups = [Server.new_session(address) for address in addresses]
        self._gradients = [
            [self._tensors(part) for part in parts_of(self._case.gradient(seat.rank, variant), self._case, parts)]
            for variant in range(NUM_VARIANTS)
        ]
        self._values = [self._case.parameter(part).detach() for part in parts]

    def _tensors(self, part: Tensor) -> Sequence[Tensor]:
        return (part.indices()[0].contiguous(), part.values()) if self._case.is_sparse else (part,)

    def step(self, variant: int) -> None:
        sent = [
            work
            for group, tensors in zip(self._groups, self._gradients[variant], strict=True)
            for work in send(group, tensors, CLIENT, is_sparse=self._case.is_sparse)
        ]
        for work in sent:
            work.wait()
        for group, own in zip(self._groups, self._values, strict=True):
            if self._case.is_sparse:
                rows, values = receive_rows(group, SERVER)
                own[rows] = values
            else:
                group.broadcast_one(own, SERVER).wait()

    def values(self) -> Sequence[Tensor]:
        return self._values


def main() -> None:
    seat = take_seat()
    deal = seat.deal
    number = seat.rank - deal.num_workers
    own = [] if seat.is_worker else [Server(case, deal.parts(case)[number], deal.num_workers) for case in deal.cases]
    told = seat.told_by_all([server.address() for server in own])[deal.num_workers :]
    if seat.is_worker:
        seat.answer(lambda case: Worker(seat, case, [addresses[case] for addresses in told]))
    wait_until_killed()


if __name__ == "__main__":
    main()
