"""Work that goes on in a thread while its caller goes on too."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def beside(work: Callable[[], T]) -> Future[T]:
    """Begun now; what it raises, whoever asks for the result is told."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="beside")
    begun = pool.submit(work)
    pool.shutdown(wait=False)
    return begun
