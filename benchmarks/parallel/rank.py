"""One rank of a layout: a few steps, and the most memory that the last one took."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.parallel.work import CASES, TIMEOUT, batch_of, recipe_of, step_in

NUM_STEPS_BEFORE = 2
"""From then on the optimizer has what it keeps."""
KIB = 1 << 10


def main() -> None:
    name, width, num_layers = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    rank, world_size = int(os.environ["RANK"]), case.layout.num_ranks
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["RENDEZVOUS"], world_size)  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    _warm_up()
    before = _bytes_of("VmRSS")
    step = step_in(case, recipe_of(int(width), int(num_layers)), rank)
    for _ in range(NUM_STEPS_BEFORE):
        step()
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    step()
    print(json.dumps(_bytes_of("VmHWM") - before))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch's own goodbye takes seconds


def _warm_up() -> None:
    """Libraries take memory when they are first used."""
    recipe = recipe_of(32, 1)
    model = recipe.model()
    recipe.loss(model, batch_of(recipe, 0)).backward()  # type: ignore[no-untyped-call]  # no annotation
    recipe.optimizer(model).step()
    dist.all_reduce(torch.zeros(1))


def _bytes_of(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * KIB
    raise LookupError(field)


if __name__ == "__main__":
    main()
