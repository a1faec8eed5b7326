"""torch.distributed.rpc's batched parameter server: workers call it with gradients; who comes last has it step, and all
calls return what it changed."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.futures import Future

from benchmarks.servers.contestants.shard import Shard, parts_of
from benchmarks.servers.pushes import NUM_VARIANTS, Case, Seat, take_seat, wait_until_killed

SOCKETS: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]}
"""Between two hosts; on one it takes memory that both have."""


class Server:
    """One shard. The answer of a step is a future that all its callers share."""

    def __init__(self, case: Case, part: range, num_workers: int) -> None:
        self._shard = Shard(case, part)
        self._num_workers = num_workers
        self._lock = threading.Lock()
        self._num_missing = num_workers
        self._answer: Future[Sequence[Tensor]] = Future()

    def push_and_pull(self, gradient: Tensor) -> Future[Sequence[Tensor]]:
        self._shard.add(gradient)
        with self._lock:
            answer = self._answer
            self._num_missing -= 1
            is_last = self._num_missing == 0
            if is_last:
                self._num_missing, self._answer = self._num_workers, Future()
        if is_last:
            self._shard.step()
            answer.set_result(self._shard.changed)
        return answer


SERVERS: list[Server] = []
"""Of this process, by case."""


@rpc.functions.async_execution  # type: ignore[untyped-decorator]  # torch has no annotation here
def push_and_pull(case: int, gradient: Tensor) -> Future[Sequence[Tensor]]:
    return SERVERS[case].push_and_pull(gradient)


class Worker:
    def __init__(self, seat: Seat, number: int) -> None:
        self._number = number
        self._case = seat.deal.cases[number]
        parts = seat.deal.parts(self._case)
        self._names = [str(seat.deal.num_workers + server) for server in range(len(parts))]
        self._gradients = [
            parts_of(self._case.gradient(seat.rank, variant), self._case, parts) for variant in range(NUM_VARIANTS)
        ]
        self._values: list[Tensor] = [self._case.parameter(part).detach() for part in parts]

    def step(self, variant: int) -> None:
        """A dense answer is taken as it came, and not copied into parameters that were there before."""
        calls = [
            rpc.rpc_async(name, push_and_pull, args=(self._number, gradient))
            for name, gradient in zip(self._names, self._gradients[variant], strict=True)
        ]
        for number, answer in enumerate(torch.futures.wait_all(calls)):
            if self._case.is_sparse:
                rows, values = answer
                self._values[number][rows] = values
            else:
                (self._values[number],) = answer

    def values(self) -> Sequence[Tensor]:
        return self._values


def main() -> None:
    seat = take_seat()
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{os.environ['RENDEZVOUS']}-rpc", **(SOCKETS if seat.deal.way == "sockets" else {})
    )
    if not seat.is_worker:
        server = seat.rank - seat.deal.num_workers
        SERVERS.extend(Server(case, seat.deal.parts(case)[server], seat.deal.num_workers) for case in seat.deal.cases)
    rpc.init_rpc(  # type: ignore[no-untyped-call]  # nor here
        str(seat.rank), rank=seat.rank, world_size=seat.deal.num_processes, rpc_backend_options=options
    )
    if seat.is_worker:
        seat.answer(lambda number: Worker(seat, number))
    wait_until_killed()


if __name__ == "__main__":
    main()
