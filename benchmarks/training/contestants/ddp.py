"""A hand-written loop around DistributedDataParallel: the same microbatches under `no_sync`, or one batch per rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, Workload, optimizer_of


def steps(workload: Workload, *, in_one_batch: bool) -> Iterator[None]:
    model = DistributedDataParallel(workload.model())
    optimizer = optimizer_of(model)
    for microbatches in workload.steps():
        parts = [torch.cat(list(microbatches))] if in_one_batch else microbatches
        optimizer.zero_grad()
        for part in parts[:-1]:
            with model.no_sync():
                (model(part) / len(parts)).backward()
        (model(parts[-1]) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        yield


if __name__ == "__main__":
    serve(lambda workload: steps(workload, in_one_batch=sys.argv[2] == "one-batch"))
