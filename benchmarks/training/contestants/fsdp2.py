"""A hand-written loop around FSDP2: the same microbatches, whose gradients it adds up whole, or one batch per rank."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchmarks.training.protocol import serve
from benchmarks.training.workload import CLIP_NORM, Workload, blocks_of, optimizer_of


def steps(workload: Workload, *, in_one_batch: bool) -> Iterator[None]:
    model = workload.model()
    for block in blocks_of(model):
        fully_shard(block)
    sharded = fully_shard(model)
    assert isinstance(sharded, FSDPModule)
    optimizer = optimizer_of(model)
    for microbatches in workload.steps():
        parts = [torch.cat(list(microbatches))] if in_one_batch else microbatches
        optimizer.zero_grad()
        for number, part in enumerate(parts):
            sharded.set_requires_gradient_sync(number == len(parts) - 1)
            (model(part) / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        yield


if __name__ == "__main__":
    serve(lambda workload: steps(workload, in_one_batch=sys.argv[2] == "one-batch"))
