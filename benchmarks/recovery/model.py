"""The parameters of a run that loses nodes, and a closed-form estimate of its goodput.

A *node* is what fails as one and is replaced as one: a server with all its accelerators. *Goodput* is the share of the
wall time that went into steps which count in the end, at the speed of all nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

DAY_SECONDS = 86_400.0
NUM_CANDIDATES = 200  # checkpoint intervals tried by `with_best_interval`, geometric
LONGEST_INTERVAL_SECONDS = 3600.0  # nobody would let more depend on the survivors
LARGEST_EXPONENT = 700.0  # math.exp overflows above 709


class Policy(Enum):
    """What is redone after a failure."""

    RESTART = "restart from checkpoint"
    """All nodes load the last checkpoint; everything since it is redone."""
    SURVIVORS = "survivors hold the state"
    """At most the broken step is redone. If all copies of a part of the state are gone, as RESTART."""


class Replacement(Enum):
    """Who does a lost node's work."""

    SPARE = "spare"
    """All wait until a replacement stands ready."""
    SHRINK = "shrink"
    """The others go on without it, slower, and pause again when its replacement joins."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A run and the machines below it. Failures are independent, with one exponential law for every node."""

    num_nodes: int
    node_mtbf_seconds: float
    """Mean time between failures of one node."""
    step_seconds: float
    """One training step on all nodes; held constant over node counts (weak scaling)."""
    detection_seconds: float
    """From a failure until all know of it."""
    regroup_seconds: float
    """Until the processes run and agree on the new group: the part that does not depend on their number."""
    regroup_seconds_per_doubling: float = 0.0
    """And for each doubling of nodes: agreement and set-up by trees take log2(n) rounds. What grows faster than that
    (an all-to-all of connections made at once) is not in the model; it must go into the constant."""
    state_bytes: float
    """What one replacement takes over from the others."""
    bandwidth_bytes_per_second: float
    """Into that one node. Replacements load beside one another."""
    checkpoint_every_seconds: float
    """Work between two checkpoints; rounded to whole steps."""
    checkpoint_stall_seconds: float
    """How long all stand still for one; it counts as written when the stall ends."""
    checkpoint_load_seconds: float
    """All nodes load the last one."""
    replacement_seconds: float
    """From the detection until the replacement stands ready: 0 for a hot spare."""
    policy: Policy
    replacement: Replacement = Replacement.SPARE
    num_copies: int = 2
    """Nodes that hold the same part of the state; `num_nodes` if it is replicated. Node i is in group i mod groups."""
    all_copies_lost_probability: float = 0.0
    """The share of failures that take every copy at once: a power domain, a bug that ends all ranks."""
    virtual_workers_per_node: int = 16
    """With nodes missing, some node computes one more of its virtual workers, and the step waits for it."""

    def __post_init__(self) -> None:
        for name in ("node_mtbf_seconds", "step_seconds", "bandwidth_bytes_per_second", "checkpoint_every_seconds"):
            _check(getattr(self, name) > 0, f"{name} must be above 0")
        for name, value in vars(self).items():
            _check(not isinstance(value, float) or (math.isfinite(value) and value >= 0), f"{name} is {value}")
        _check(self.num_nodes >= 1, "num_nodes must be at least 1")
        _check(1 <= self.num_copies <= self.num_nodes, "num_copies must be between 1 and num_nodes")
        _check(self.all_copies_lost_probability <= 1, "all_copies_lost_probability is above 1")
        _check(self.virtual_workers_per_node >= 1, "virtual_workers_per_node must be at least 1")

    @property
    def failures_per_second(self) -> float:
        return self.num_nodes / self.node_mtbf_seconds

    @property
    def group_seconds(self) -> float:
        """All of the regroup."""
        return self.regroup_seconds + self.regroup_seconds_per_doubling * math.log2(self.num_nodes)

    @property
    def transfer_seconds(self) -> float:
        return self.state_bytes / self.bandwidth_bytes_per_second

    @property
    def steps_per_checkpoint(self) -> int:
        return max(1, round(self.checkpoint_every_seconds / self.step_seconds))

    def speed(self, num_missing: int) -> tuple[int, int]:
        """As a fraction, without so many nodes: that of the node with the most virtual workers."""
        num_left = self.num_nodes - num_missing
        total = self.virtual_workers_per_node * self.num_nodes
        return self.virtual_workers_per_node, -(-total // num_left)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def estimate(p: Parameters) -> float:
    """Goodput in closed form; simulate to see what it leaves out.

    Exact for RESTART with spares (Daly's formula, doi:10.1016/j.future.2004.11.016) and for SURVIVORS with
    spares where no failure takes all copies, both up to the nodes that cannot fail while they are missing. Otherwise to
    first order: losses of all copies are put on top of the undisturbed cycle, and shrinking is a mean speed.
    """
    rate = p.failures_per_second
    bad_rate = rate * _fatal_share(p)
    repair, reload = _repair_seconds(p)
    calm_cost = _interrupted(repair, rate)
    cycle = p.steps_per_checkpoint * _unbroken(p.step_seconds, rate - bad_rate, calm_cost)
    cycle += _unbroken(p.checkpoint_stall_seconds, rate - bad_rate, calm_cost)
    cycle = _unbroken(cycle, bad_rate, _interrupted(reload, rate))
    return p.steps_per_checkpoint * p.step_seconds / cycle * _mean_speed(p)


def with_best_interval(p: Parameters) -> Parameters:
    """With the checkpoint interval of the best estimate, an hour at most: Young's, but for long recoveries too."""
    candidates = np.geomspace(p.step_seconds, LONGEST_INTERVAL_SECONDS, NUM_CANDIDATES).tolist()
    return max((replace(p, checkpoint_every_seconds=every) for every in candidates), key=estimate)


def _unbroken(seconds: float, rate: float, cost: float) -> float:
    """Mean wall time until so many seconds have passed without a break; each break costs `cost` and begins anew."""
    if rate * seconds > LARGEST_EXPONENT:
        return math.inf
    return seconds if rate <= 0 else math.expm1(rate * seconds) * (1 / rate + cost)


def _interrupted(seconds: float, rate: float) -> float:
    """Mean wall time of a recovery of so many seconds, where each further failure begins it anew."""
    return _unbroken(seconds, rate, 0.0)


def _repair_seconds(p: Parameters) -> tuple[float, float]:
    """How long all stand still for one failure: while a copy of the state lives, and when none does."""
    waiting = p.replacement_seconds if p.replacement is Replacement.SPARE else 0.0
    start = p.detection_seconds + waiting + p.group_seconds
    joining = p.group_seconds if p.replacement is Replacement.SHRINK else 0.0  # a second pause, for the replacement
    return start + joining + p.transfer_seconds, start + p.checkpoint_load_seconds


def _fatal_share(p: Parameters) -> float:
    """The share of failures after which no copy is left."""
    if p.policy is Policy.RESTART:
        return 1.0
    missing_seconds = _repair_seconds(p)[0]
    if p.replacement is Replacement.SHRINK:
        missing_seconds += p.replacement_seconds
    another_missing = missing_seconds / (p.node_mtbf_seconds + missing_seconds)
    exhausted = another_missing ** (p.num_copies - 1)
    return p.all_copies_lost_probability + (1 - p.all_copies_lost_probability) * exhausted


def _mean_speed(p: Parameters) -> float:
    """Over the number of missing nodes, which is Poisson distributed when the rest goes on."""
    if p.replacement is Replacement.SPARE:
        return 1.0
    mean = p.failures_per_second * (p.detection_seconds + p.replacement_seconds)
    most = min(p.num_nodes - 1, int(mean + 10 * math.sqrt(mean) + 10))
    weights = [
        math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) if mean else float(n == 0) for n in range(most + 1)
    ]
    speeds = [above / below for above, below in map(p.speed, range(most + 1))]
    return sum(weight * speed for weight, speed in zip(weights, speeds, strict=True)) / sum(weights)
