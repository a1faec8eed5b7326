"""What every contestant pushes, and how its processes are told to: lines `CASE TIMES` on standard input."""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

WIDTH = 64
LEARNING_RATE = 2.0**-10
GREATEST = 2
"""Gradients are small whole numbers and the rate is a power of two: every order of adding gives the same bits."""
NUM_VARIANTS = 2
"""Other rows in each step, in turn."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Some rows of a parameter; all, if it is dense."""

    numbers: Tensor
    """Ascending."""
    values: Tensor

    def within(self, part: range) -> Gradient:
        """Those of a part of the rows, numbered from its start, not copied."""
        start, stop = torch.searchsorted(self.numbers, torch.tensor([part.start, part.stop])).tolist()
        return Gradient(numbers=self.numbers[start:stop] - part.start, values=self.values[start:stop])

    def as_sparse(self, num_rows: int) -> Tensor:
        return torch.sparse_coo_tensor(
            self.numbers[None], self.values, (num_rows, WIDTH), is_coalesced=True, check_invariants=False
        )


@dataclass(frozen=True, kw_only=True)
class Case:
    """One parameter, and the share of its rows that a worker has gradients of."""

    num_rows: int
    density: float = 1.0

    @property
    def title(self) -> str:
        size = f"{self.num_rows * WIDTH * 4 / 1e6:.0f} MB"
        return f"{size}, {self.density:.1%} of the rows" if self.is_sparse else f"{size}, dense"

    @property
    def is_sparse(self) -> bool:
        return self.density < 1

    def parameter(self, part: range | None = None) -> nn.Parameter:
        return nn.Parameter(torch.zeros(len(part) if part is not None else self.num_rows, WIDTH))

    def gradient(self, worker: int, variant: int) -> Gradient:
        chance = torch.Generator().manual_seed(worker * NUM_VARIANTS + variant)
        num_chosen = round(self.density * self.num_rows)
        chosen = torch.randperm(self.num_rows, generator=chance)[:num_chosen].sort().values
        values = torch.randint(-GREATEST, GREATEST + 1, (num_chosen, WIDTH), generator=chance)
        return Gradient(numbers=chosen, values=values.to(torch.float32))


def optimizer_of(parameter: nn.Parameter) -> Optimizer:
    return SGD([parameter], lr=LEARNING_RATE, foreach=False)


@dataclass(frozen=True, kw_only=True)
class Deal:
    """Who takes part. The processes after the workers have the servers."""

    cases: Sequence[Case]
    num_workers: int
    num_servers: int = 0
    num_replicas: int = 1
    way: str = ""
    """Of the contestant's own: what it is sent by."""

    @property
    def num_processes(self) -> int:
        return self.num_workers + (max(self.num_servers, self.num_replicas) if self.num_servers else 0)

    def parts(self, case: Case) -> list[range]:
        """The rows of each server, for those who do not cut parameters themselves."""
        cuts = [case.num_rows * number // self.num_servers for number in range(self.num_servers + 1)]
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Deal:
        fields = json.loads(text)
        return cls(**{**fields, "cases": [Case(**case) for case in fields["cases"]]})


class Worker(Protocol):
    """One worker in one case."""

    def step(self, variant: int) -> None:
        """Push a gradient, and have the parameters that everybody's made."""
        ...

    def values(self) -> Sequence[Tensor]:
        """The parameter, in parts."""
        ...


@dataclass
class Seat:
    """This process, which has met all others."""

    deal: Deal
    rank: int
    workers: Any

    @property
    def is_worker(self) -> bool:
        return self.rank < self.deal.num_workers

    @cached_property
    def _replies(self) -> Any:
        """Standard output. What libraries print goes to stderr."""
        found = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        return found

    def told_by_all(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.deal.num_processes
        dist.all_gather_object(found, own)
        return found

    def answer(self, make: Callable[[int], Worker]) -> None:
        """Until standard input closes."""
        made: dict[int, Worker] = {}
        replies = self._replies
        for line in sys.stdin:
            case, num_times = map(int, line.split())
            if case not in made:
                made[case] = make(case)
            seconds = self._timed(made[case], num_times)
            digest = 0
            for part in made[case].values():
                digest = zlib.crc32(part.detach().numpy().data.cast("B"), digest)
            replies.write(json.dumps({"seconds": seconds, "digest": digest}) + "\n")
            replies.flush()
        os._exit(0)

    def _timed(self, worker: Worker, num_times: int) -> float:
        dist.barrier(self.workers)
        started = time.perf_counter()
        for number in range(num_times):
            worker.step(number % NUM_VARIANTS)
        return time.perf_counter() - started


def take_seat() -> Seat:
    """The first command-line argument is the deal; `RANK` and `RENDEZVOUS` (a file) are in the environment."""
    torch.set_num_threads(1)
    deal, rank = Deal.decode(sys.argv[1]), int(os.environ["RANK"])
    store = dist.FileStore(os.environ["RENDEZVOUS"], deal.num_processes)  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("gloo", store=store, rank=rank, world_size=deal.num_processes)
    return Seat(deal, rank, dist.new_group(range(deal.num_workers)))


def wait_until_killed() -> None:
    """Of a process that has servers: threads do their work."""
    sys.stdin.read()
