"""One rank of a layout: a few steps, and the most memory that the last one took."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.parallel.ranks import answer, meet
from benchmarks.parallel.work import CASES, batch_of, recipe_of, step_in

NUM_STEPS_BEFORE = 2
"""From then on the optimizer has what it keeps."""
KIB = 1 << 10


def main() -> None:
    name, width, num_layers = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    rank = meet()
    _warm_up()
    before = _bytes_of("VmRSS")
    step = step_in(case, recipe_of(int(width), int(num_layers)), rank)
    for _ in range(NUM_STEPS_BEFORE):
        step()
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    step()
    answer(_bytes_of("VmHWM") - before)


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
