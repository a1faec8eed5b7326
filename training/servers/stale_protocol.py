"""The words of bounded staleness (training.servers.staleness): from a worker to a shard, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.servers.protocol import Message


@dataclass(frozen=True, kw_only=True)
class Places:
    """Which worker has each place, by the run record of that token."""

    token: int
    workers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Join(Message):
    """How far has my place come? Its worker before may be dead."""


@dataclass(frozen=True, kw_only=True)
class Joined(Message):
    clock: int
    """The number of steps of that place which the shard has applied."""


@dataclass(frozen=True, kw_only=True)
class Update(Message):
    """What a worker's step of that number adds, to be applied at once."""

    clock: int
    update: Any


@dataclass(frozen=True, kw_only=True)
class Read(Message):
    """Of a worker that has finished so many steps: the parameters for the next one."""

    clock: int
    is_barrier: bool = False
    """Those of all steps up to there, of all workers."""
    wants_barrier: bool = False
    """As soon as may be."""


@dataclass(frozen=True, kw_only=True)
class Fresh(Message):
    """Parameters that are fresh enough for a worker which has finished so many steps."""

    clock: int
    barrier: int
    """The step at which all workers are to meet, as one of them wants it; 0: none does. The first shard's counts."""
    values: Any
