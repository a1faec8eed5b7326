"""Words that are heard one after another, by whoever brings one: to wake a thread for each would be most of what a step
of a small model costs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Word = TypeVar("Word")


class Mailbox(Generic[Word]):
    """`hear` is called for each word, in the order in which they were put, and never twice at a time. Nobody waits: who
    puts a word while another one is heard leaves it to that one's thread. So `hear` may lead to a word for itself."""

    def __init__(self, hear: Callable[[Word], None]) -> None:
        """`hear` raises nothing."""
        self._hear = hear
        self._words: deque[Word] = deque()
        self._hearing = threading.Lock()

    def put(self, word: Word) -> None:
        self._words.append(word)
        while self._words and self._hearing.acquire(blocking=False):
            try:
                if self._words:
                    self._hear(self._words.popleft())
            finally:
                self._hearing.release()

    def freeze(self, *, timeout_seconds: float) -> bool:
        """Between two words, for ever: nothing is heard any more. False if the one being heard took too long."""
        return self._hearing.acquire(timeout=timeout_seconds)
