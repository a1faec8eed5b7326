"""Pipeline schedules: in which order a stage computes its microbatches, as far as time and memory hang on it."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

Schedule = Literal["gpipe", "1f1b", "interleaved"]
NUM_CHUNKS = 2
"""Of the interleaved schedule: so many parts of the model a rank has, each a turn apart."""


def chunks_per_rank(schedule: Schedule) -> int:
    return NUM_CHUNKS if schedule == "interleaved" else 1


def bubble(schedule: Schedule, *, num_stages: int, num_microbatches: int) -> Fraction:
    """The share of a step in which a rank waits, if all parts take equally long: (p-1)/(m+p-1), and with v chunks to a
    rank (p-1)/(vm+p-1). (GPipe: Huang et al., NeurIPS'19; interleaved: Narayanan et al., SC'21.)"""
    turns = chunks_per_rank(schedule) * num_microbatches
    return Fraction(num_stages - 1, turns + num_stages - 1)


def num_in_flight(schedule: Schedule, *, stage: int, num_stages: int, num_microbatches: int) -> Fraction:
    """Of how many microbatches a rank keeps what its backward pass needs, at most."""
    if schedule == "gpipe":
        return Fraction(num_microbatches)
    later = num_stages - 1 - stage
    if schedule == "1f1b":
        return Fraction(min(num_microbatches, later + 1))
    num_chunks = 2 * later + (NUM_CHUNKS - 1) * num_stages + 1
    return Fraction(min(NUM_CHUNKS * num_microbatches, num_chunks), NUM_CHUNKS)
