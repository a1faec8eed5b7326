"""How far a training with matrices in parts may be from that of one process."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from tests.distributed.ranks import RankPool
from tests.distributed.tensoring import disturbed, in_tensors

NUM_DISTURBED = 3


def with_bounds(ranks: RankPool, recipe: str, train: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """What a layout changes are roundings of sums of products. Each sum is known to be off by at most n·u·Σ|products|;
    what becomes of that in a training is its own condition, and so it is tried: in one process each of these sums is
    disturbed by up to that bound, at random. As far as the losses of some such trainings were off so far, those of a
    layout may be, whose roundings are smaller by about √n."""
    one: dict[str, Any] = ranks.run(in_tensors, 1, recipe, None, True, train, num_steps)[0]
    others = [ranks.run(disturbed, 1, recipe, train, num_steps, seed)[0] for seed in range(NUM_DISTURBED)]
    differences = [
        [max(abs(other[step][value] - one["history"][step][value]) for other in others) for step in range(num_steps)]
        for value in range(2)
    ]
    return {**one, "bounds": [list(accumulate(of_value, max)) for of_value in differences]}


def num_beyond(history: list[Any], one: dict[str, Any]) -> int:
    """Losses and norms that are further from one process's than their bounds."""
    return sum(
        abs(told[value] - of_one[value]) > one["bounds"][value][step]
        for step, (told, of_one) in enumerate(zip(history, one["history"], strict=False))
        for value in range(2)
    )
