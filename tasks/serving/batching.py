"""Which requests go through the model together: what waits when it is free, in order, as far as it goes together.

So a request that comes alone waits for nothing, and one that comes while the model is busy for one batch at most.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tasks.serving.program import Program

MAX_BATCH_ROWS = 256


@dataclass(frozen=True)
class Request:
    """Rows for one program."""

    number: int
    program: Program
    inputs: np.ndarray[Any, Any]

    @property
    def num_rows(self) -> int:
        return len(self.inputs)

    def goes_with(self, other: Request) -> bool:
        """Two versions never meet in a batch, nor rows of different shapes."""
        return self.program is other.program and self.inputs.shape[1:] == other.inputs.shape[1:]


class Waiting:
    """A queue between the thread that reads requests and the one that computes."""

    def __init__(self) -> None:
        self._requests: deque[Request] = deque()
        self._is_there = threading.Condition()

    def put(self, request: Request) -> None:
        with self._is_there:
            self._requests.append(request)
            self._is_there.notify()

    def take(self) -> list[Request]:
        """The next batch, as soon as there is a request."""
        with self._is_there:
            while not self._requests:
                self._is_there.wait()
            return next_batch(self._requests)


def next_batch(requests: deque[Request], *, max_rows: int = MAX_BATCH_ROWS) -> list[Request]:
    """Takes the first, and those right behind it that fit. A request of more rows than `max_rows` goes alone."""
    batch = [requests.popleft()]
    num_rows = batch[0].num_rows
    while requests and requests[0].goes_with(batch[0]) and num_rows + requests[0].num_rows <= max_rows:
        num_rows += requests[0].num_rows
        batch.append(requests.popleft())
    return batch
