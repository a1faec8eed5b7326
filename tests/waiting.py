"""Waiting for conditions, never for time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 0.5
PAUSE_SHARE = 4
"""So many times as long as a look took: who asks servers without a pause takes the CPU from what he waits for."""


def wait_until(condition: Callable[[], T | None], *, what: str, timeout_seconds: float = 240.0) -> T:
    """The first true value of `condition`. Fails naming `what` if it does not come."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        began = time.monotonic()
        value = condition()
        if value:
            return value
        now = time.monotonic()
        if now > deadline:
            raise AssertionError(f"waited {timeout_seconds:.0f} s for {what}, in vain")
        time.sleep(min(max(PAUSE_SECONDS, PAUSE_SHARE * (now - began)), MAX_PAUSE_SECONDS))
