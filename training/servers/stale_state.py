"""A shard with bounded staleness: its tensors, which steps of each place made them, and the history of that."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.servers.arithmetic import Decision, TensorState

HISTORY_FOLDER = "UNBROKEN_STALENESS_HISTORY"
"""In the environment: where each shard writes what it applied and what it answered, to be checked afterwards."""

Note = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What one place's step adds to a shard: an optimizer step of its own."""

    step: int
    token: int
    gradients: Tensor
    """Of the shard's pieces, end to end: the means over the place's virtual workers."""
    decision: Decision
    """By the norm of that place's whole gradient; its learning rate is in proportion to its virtual workers."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A shard's parameters, as a place gets them."""

    values: Tensor
    seen: tuple[int, ...]
    """Of each place, how many steps made them."""


class StaleState:
    """What training.servers.staleness wants of a shard."""

    def __init__(
        self, tensors: TensorState, *, num_places: int, step: int, note: Note = lambda operation: None
    ) -> None:
        """`note` hears of all that is done, in its order."""
        self._tensors = tensors
        self._seen = [step] * num_places
        self._note = note

    def apply(self, place: int, update: Contribution) -> None:
        self._tensors.apply(update.gradients, update.decision)
        self._seen[place] += 1
        self._note({"applied": update.step, "place": place, "token": update.token})

    def values(self, place: int, clock: int) -> Reading:
        seen = tuple(self._seen)
        self._note({"read": clock, "place": place, "seen": seen})
        return Reading(values=self._tensors.values(), seen=seen)

    def snapshot(self) -> dict[str, Any]:
        return self._tensors.snapshot()


def history_of(shard: int, token: int) -> Note:
    """Lines of JSON, if somebody wants to check them."""
    folder = os.environ.get(HISTORY_FOLDER)
    if not folder:
        return lambda operation: None
    path = Path(folder) / f"shard-{shard}-token-{token}.jsonl"

    def note(operation: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(operation) + "\n")

    return note
