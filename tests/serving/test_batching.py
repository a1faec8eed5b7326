"""What waits goes through the model together, in order, and never with another version; what fails, fails alone."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from tasks.serving.batching import Request, next_batch
from tasks.serving.computing import compute

OLD: Any = object()
NEW: Any = object()


def _taken(*requests: tuple[Any, int, int]) -> list[list[int]]:
    waiting = deque(Request(i, program, np.zeros((rows, width))) for i, (program, rows, width) in enumerate(requests))
    batches = []
    while waiting:
        batches.append([request.number for request in next_batch(waiting, max_rows=8)])
    return batches


def test_all_that_fits_goes_together() -> None:
    assert _taken((OLD, 3, 1), (OLD, 5, 1), (OLD, 1, 1)) == [[0, 1], [2]]


def test_versions_and_shapes_never_meet() -> None:
    assert _taken((OLD, 1, 1), (NEW, 1, 1), (OLD, 1, 1), (OLD, 1, 2)) == [[0], [1], [2], [3]]


def test_a_large_request_goes_alone() -> None:
    assert _taken((OLD, 1, 1), (OLD, 100, 1), (OLD, 1, 1)) == [[0], [1], [2]]


class Played:
    """Doubles; raises for a batch with a number above 1000, and gives no number for 7."""

    version = "3"

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def run(self, inputs: np.ndarray) -> np.ndarray:
        self.num_rows.append(len(inputs))
        if (inputs > 1000).any():
            raise IndexError("out of range\nand more")
        return np.where(inputs == 7, np.nan, inputs * 2)


def _computed(*inputs: list[float]) -> tuple[list[int], list[object]]:
    program: Any = Played()
    batch = [Request(i, program, np.array(values).reshape(-1, 1)) for i, values in enumerate(inputs)]
    found = [one.failure or one.outputs.ravel().tolist() for one in compute(batch)]
    return program.num_rows, found


def test_each_gets_its_own_rows() -> None:
    assert _computed([1], [2, 3], [4]) == ([4], [[2], [4, 6], [8]])


def test_what_raises_fails_alone() -> None:
    assert _computed([1], [2, 2000], [4]) == (
        [4, 1, 2, 1],
        [[2], "version 3 raised IndexError: out of range", [8]],
    )


def test_what_is_not_finite_fails_alone() -> None:
    assert _computed([1], [2, 7]) == ([3], [[2], "version 3 gave no finite number for row 1"])
