"""Llama 3's published run, and what other recoveries would make of it on more nodes.

Published, "The Llama 3 Herd of Models", arXiv:2407.21783: 16,384 GPUs in servers of eight and 16M tokens a batch at 400
TFLOP/s each (3.3.1, table 4), so a step of 6.2 s; 4 GB of state per GPU at most, storage of 2 TB/s (3.3.1); 466
interruptions in 54 days, 47 of them planned, 54 of the others software bugs (3.3.4, table 5); "higher than 90%
effective training time" (3.3.4). Everything else here is assumed, and `sensitivity` says how much hangs on it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from benchmarks.recovery.model import DAY_SECONDS, Parameters, Policy, Replacement, estimate, with_best_interval
from benchmarks.recovery.simulation import simulate

LLAMA3_DAYS = 54
LLAMA3_INTERRUPTIONS = 466
LLAMA3_UNEXPECTED = 419
LLAMA3_SOFTWARE_BUGS = 54
LLAMA3_GOODPUT_ABOVE = 0.9
LLAMA3_NODES = 16_384 // 8
LLAMA3_STEP_SECONDS = 6 * 405e9 * 16 * 2**20 / (16_384 * 400e12)
"""6 FLOPs per parameter and token: 16M tokens through 405B parameters on all GPUs."""
GPUS_PER_NODE = 8
BYTES_PER_GPU = 4e9
STORAGE_BYTES_PER_SECOND = 2e12
ACROSS_ALL_COPIES = LLAMA3_SOFTWARE_BUGS / LLAMA3_UNEXPECTED

LLAMA3 = Parameters(
    num_nodes=LLAMA3_NODES,
    node_mtbf_seconds=LLAMA3_DAYS * DAY_SECONDS * LLAMA3_NODES / LLAMA3_INTERRUPTIONS,
    step_seconds=LLAMA3_STEP_SECONDS,
    checkpoint_load_seconds=16_384 * BYTES_PER_GPU / STORAGE_BYTES_PER_SECOND,
    policy=Policy.RESTART,
    # Assumed from here on.
    detection_seconds=120.0,
    replacement_seconds=60.0,
    regroup_seconds=300.0,
    checkpoint_every_seconds=600.0,
    checkpoint_stall_seconds=5.0,
    state_bytes=GPUS_PER_NODE * BYTES_PER_GPU,
    bandwidth_bytes_per_second=50e9,  # one 400 Gbit/s link of the eight
)

QUICK = replace(
    LLAMA3, detection_seconds=0.3, replacement_seconds=0.0, regroup_seconds=0.2, regroup_seconds_per_doubling=0.02
)
"""The same machines with hot spares and a recovery of less than a second; assumed until `calibrate` has measured it."""

SURVIVORS = replace(QUICK, policy=Policy.SURVIVORS, all_copies_lost_probability=ACROSS_ALL_COPIES)

SCENARIOS: Mapping[str, Parameters] = MappingProxyType(
    {
        "restart in minutes": LLAMA3,
        "restart in seconds": QUICK,
        "survivors, shrink": replace(SURVIVORS, replacement=Replacement.SHRINK, replacement_seconds=600.0),
        "survivors, hot spares": SURVIVORS,
        "survivors, a copy always lives": replace(SURVIVORS, all_copies_lost_probability=0.0),
    }
)
NODE_COUNTS = (16, 64, 256, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
HORIZON_SECONDS = 30 * DAY_SECONDS
SEEDS = range(3)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Goodput of one scenario on so many nodes."""

    scenario: str
    num_nodes: int
    checkpoint_every_seconds: float
    simulated: float
    """The mean of the seeds."""
    estimated: float


def at(p: Parameters, num_nodes: int) -> Parameters:
    """On so many nodes, with the checkpoint interval that is best there."""
    return with_best_interval(replace(p, num_nodes=num_nodes))


def goodput(p: Parameters, *, horizon_seconds: float = HORIZON_SECONDS) -> float:
    return statistics.fmean(simulate(p, horizon_seconds=horizon_seconds, seed=seed).goodput for seed in SEEDS)


def sweep(scenario: str, node_counts: tuple[int, ...] = NODE_COUNTS) -> Iterator[Point]:
    """The same machines and the same work per node, in other numbers."""
    for num_nodes in node_counts:
        p = at(SCENARIOS[scenario], num_nodes)
        yield Point(
            scenario=scenario,
            num_nodes=num_nodes,
            checkpoint_every_seconds=p.checkpoint_every_seconds,
            simulated=goodput(p),
            estimated=estimate(p),
        )


def llama3_goodput(p: Parameters = LLAMA3) -> float:
    """Simulated over the published 54 days."""
    return goodput(p, horizon_seconds=LLAMA3_DAYS * DAY_SECONDS)


def llama3_allowed_loss_seconds() -> float:
    """What an interruption may cost in all, stalls for checkpoints included, if 90 % are to be left: no assumption."""
    return (1 - LLAMA3_GOODPUT_ABOVE) * LLAMA3_DAYS * DAY_SECONDS / LLAMA3_INTERRUPTIONS


ASSUMED: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "detection_seconds": (30.0, 60.0, 120.0, 240.0, 600.0),
        "replacement_seconds": (0.0, 30.0, 60.0, 120.0, 300.0),
        "regroup_seconds": (75.0, 150.0, 300.0, 450.0, 600.0),
        "checkpoint_every_seconds": (150.0, 300.0, 600.0, 1200.0, 1800.0),
        "checkpoint_stall_seconds": (1.0, 2.5, 5.0, 10.0, 30.0),
        "checkpoint_load_seconds": (3.0, 10.0, LLAMA3.checkpoint_load_seconds, 60.0, 120.0),
    }
)
"""Of Llama 3's run, each around the value taken, which stands in the middle."""

SLOWER: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "detection_seconds": (0.3, 1.0, 3.0, 10.0, 30.0),
        "regroup_seconds": (0.2, 1.0, 3.0, 10.0, 30.0),
        "regroup_seconds_per_doubling": (0.0, 0.02, 0.1, 0.5, 2.0),
        "bandwidth_bytes_per_second": (1e9, 5e9, 50e9, 100e9, 400e9),
        "all_copies_lost_probability": (0.0, 0.05, ACROSS_ALL_COPIES, 0.25, 1.0),
    }
)
"""Of the recovery by survivors: how slow or unlucky it may be."""


def sensitivity(
    p: Parameters, varied: Mapping[str, tuple[float, ...]], *, days: int
) -> Iterator[tuple[str, float, float]]:
    """Parameter, value, simulated goodput: one changed at a time."""
    for name, values in varied.items():
        for value in values:
            change: dict[str, Any] = {name: value}
            yield name, value, goodput(replace(p, **change), horizon_seconds=days * DAY_SECONDS)
