"""Pipeline schedules: in which order a stage computes its microbatches, what it waits for, and how much it keeps.

A chunk is a consecutive part of the model; chunk c is on stage c mod p. With one chunk to a stage these are GPipe
(Huang et al., NeurIPS'19) and 1F1B (PipeDream-Flush, Narayanan et al., ICML'21), with more of them interleaved 1F1B
(Narayanan et al., SC'21). In all of them a chunk's microbatches go forward in their order, and back in the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from training.errors import UserError
from training.layout import Schedule

Verb = Literal["receive", "compute", "send"]
NUM_CHUNKS = 2
"""Of the interleaved schedule: so many parts of the model a rank has, each a turn apart."""


@dataclass(frozen=True)
class Pass:
    """A microbatch through a chunk, forward or back."""

    is_forward: bool
    chunk: int
    microbatch: int

    def maybe_before(self, num_chunks: int) -> Pass | None:
        """Whose outputs, or gradients, it takes."""
        chunk = self.chunk - 1 if self.is_forward else self.chunk + 1
        return Pass(self.is_forward, chunk, self.microbatch) if 0 <= chunk < num_chunks else None

    def is_last_of_its_way(self, num_chunks: int) -> bool:
        return self.chunk == (num_chunks - 1 if self.is_forward else 0)


@dataclass(frozen=True)
class Action:
    """Compute a pass, send what it gave to the next stage, or wait for what it gave on another one."""

    verb: Verb
    of: Pass


def chunks_per_rank(schedule: Schedule) -> int:
    return NUM_CHUNKS if schedule == "interleaved" else 1


def require_fit(schedule: Schedule, *, num_stages: int, num_microbatches: int) -> None:
    """Raises `UserError` if the schedule cannot do with so many microbatches."""
    if schedule == "interleaved" and num_microbatches % num_stages:
        raise UserError(
            f"an interleaved pipeline of {num_stages} stages takes a multiple of {num_stages} microbatches, and here"
            f" are {num_microbatches}: change train.virtual_workers, or take 1f1b"
        )


def actions(schedule: Schedule, *, stage: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """What a stage does in a step, in order. A send waits for nobody; a receive does."""
    num_chunks = num_stages * chunks_per_rank(schedule)
    found = []
    for one in passes(schedule, stage=stage, num_stages=num_stages, num_microbatches=num_microbatches):
        if maybe_before := one.maybe_before(num_chunks):
            found.append(Action("receive", maybe_before))
        found.append(Action("compute", one))
        if not one.is_last_of_its_way(num_chunks):
            found.append(Action("send", one))
    return found


def passes(schedule: Schedule, *, stage: int, num_stages: int, num_microbatches: int) -> list[Pass]:
    """What a stage computes in a step: some go forward, then one back after each one forward, then the rest back."""
    require_fit(schedule, num_stages=num_stages, num_microbatches=num_microbatches)
    num_own = chunks_per_rank(schedule)
    turns = range(num_own * num_microbatches)
    forward = [_pass(turn, True, stage, num_stages, num_own) for turn in turns]
    back = [_pass(turn, False, stage, num_stages, num_own) for turn in turns]
    num_ahead = _num_ahead(schedule, stage, num_stages, num_microbatches)
    found = forward[:num_ahead]
    for one, other in zip(forward[num_ahead:], back, strict=False):
        found += [one, other]
    return found + back[len(turns) - num_ahead :]


def _pass(turn: int, is_forward: bool, stage: int, num_stages: int, num_own: int) -> Pass:
    """As many microbatches as there are stages go through one of the rank's chunks, then through the next."""
    group, within = divmod(turn, num_stages * num_own)
    number, microbatch = divmod(within, num_stages)
    own_chunk = number if is_forward else num_own - 1 - number
    return Pass(is_forward, own_chunk * num_stages + stage, group * num_stages + microbatch)


def _num_ahead(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """So many passes go forward before any goes back."""
    num_own = chunks_per_rank(schedule)
    later = num_stages - 1 - stage
    of_schedule = {
        "gpipe": num_microbatches,
        "1f1b": later,
        "interleaved": 2 * later + (num_own - 1) * num_stages,
    }
    return min(num_own * num_microbatches, of_schedule[schedule])


def bubble(schedule: Schedule, *, num_stages: int, num_microbatches: int) -> Fraction:
    """The share of a step in which a rank waits, if all parts take equally long: (p-1)/(m+p-1), and with v chunks to a
    rank (p-1)/(vm+p-1)."""
    turns = chunks_per_rank(schedule) * num_microbatches
    return Fraction(num_stages - 1, turns + num_stages - 1)


def num_in_flight(schedule: Schedule, *, stage: int, num_stages: int, num_microbatches: int) -> Fraction:
    """Of how many microbatches a rank keeps what its backward pass needs, at most. A chunk is a part of one."""
    num_own = chunks_per_rank(schedule)
    num_ahead = _num_ahead(schedule, stage, num_stages, num_microbatches)
    return Fraction(min(num_own * num_microbatches, num_ahead + 1), num_own)
