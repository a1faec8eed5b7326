"""No server: gloo's all-reduce, as DistributedDataParallel does it of a bucket, and a step of one's own optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.servers.pushes import NUM_VARIANTS, Case, Seat, optimizer_of, take_seat


class Worker:
    def __init__(self, seat: Seat, case: Case) -> None:
        self._case = case
        self._gradients = [case.gradient(seat.rank, variant) for variant in range(NUM_VARIANTS)]
        self._parameter = case.parameter()
        self._optimizer = optimizer_of(self._parameter)
        self._bucket = torch.empty_like(self._parameter)

    def step(self, variant: int) -> None:
        """DDP copies gradients into its bucket too."""
        gradient = self._gradients[variant]
        if self._case.is_sparse:
            self._parameter.grad = gradient.as_sparse(self._case.num_rows).clone()
        else:
            self._parameter.grad = self._bucket.copy_(gradient.values)
        dist.all_reduce(self._parameter.grad)
        self._optimizer.step()

    def values(self) -> Sequence[Tensor]:
        return [self._parameter]


def main() -> None:
    seat = take_seat()
    seat.answer(lambda number: Worker(seat, seat.deal.cases[number]))


if __name__ == "__main__":
    main()
