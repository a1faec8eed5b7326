"""What waits goes through the model together, in order, and never with another version."""

from __future__ import annotations

from collections import deque
from typing import cast

import numpy as np

from tasks.serving.batching import Request, next_batch
from tasks.serving.program import Program

OLD, NEW = cast(Program, object()), cast(Program, object())


def _taken(*requests: tuple[Program, int, int]) -> list[list[int]]:
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
