"""Asking again what is away just now."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def ask_until(
    ask: Callable[[], T],
    *,
    seconds: float,
    pause_seconds: float,
    errors: tuple[type[Exception], ...],
    tell: Callable[[Exception], None],
) -> T:
    """What `ask` says, asked again after each of these errors, which are told. After so many seconds the next one is
    raised."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except errors as error:
            if time.monotonic() > deadline:
                raise
            tell(error)
            time.sleep(pause_seconds)
