"""The most memory that a rank takes in a step, in each layout, beside what `unbroken plan` says.

Each rank is a fresh process; what it has before there is a model is not counted. The peak is the kernel's own mark.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from benchmarks.parallel.ranks import answers_of
from benchmarks.parallel.work import BATCH, CASES, VIRTUAL_WORKERS, Case, recipe_of
from training.parallel.measure import measure
from training.parallel.plan import Cost, ModelCost, cost

MIB = 2**20


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.parallel memory", description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args(arguments)
    recipe = recipe_of(asked.width, asked.layers)
    sample = {"bytes": np.zeros(recipe.sequence_bytes + 1, np.uint8)}
    model = measure(recipe, sample, batch_size=BATCH // VIRTUAL_WORKERS, precision="float32")
    print(f"{model.weight_bytes / MIB:.1f} MiB of weights, {VIRTUAL_WORKERS} virtual workers, in MiB\n")
    print("| layout | measured | plan | plan / measured | weights | gradients | optimizer | activations |")
    print("| --- " * 8 + "|")
    for case in CASES:
        print(_row(case, _measured(case, asked.width, asked.layers), _planned(model, case)), flush=True)


def _planned(model: ModelCost, case: Case) -> Cost:
    return cost(model, case.layout, case.maybe_schedule, virtual_workers=VIRTUAL_WORKERS)


def _row(case: Case, measured: int, planned: Cost) -> str:
    parts = (planned.weight_bytes, planned.gradient_bytes, planned.optimizer_bytes, planned.activation_bytes)
    numbers = " | ".join(f"{part / MIB:.1f}" for part in parts)
    total = planned.memory_bytes
    return f"| {case.name} | {measured / MIB:.1f} | {total / MIB:.1f} | {total / measured:.2f} | {numbers} |"


def _measured(case: Case, width: int, num_layers: int) -> int:
    """Of the rank that takes most."""
    frees = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # what is freed goes back to the kernel
    answers = answers_of("memory_rank", case.name, width, num_layers, num_ranks=case.layout.num_ranks, **frees)
    return max(map(int, answers))
