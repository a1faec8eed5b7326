"""Words are heard in their order, one at a time, by whoever brings one; nobody waits for that."""

from __future__ import annotations

import threading

from training.servers.mailbox import Mailbox

NUM_THREADS, NUM_WORDS = 4, 2000


def test_of_many_threads_each_word_is_heard_once_and_in_its_order() -> None:
    heard: list[tuple[int, int]] = []
    hearing = threading.Lock()

    def hear(word: tuple[int, int]) -> None:
        assert hearing.acquire(blocking=False), "two are heard at a time"
        heard.append(word)
        hearing.release()

    mailbox = Mailbox(hear)
    threads = [
        threading.Thread(target=lambda own=own: [mailbox.put((own, number)) for number in range(NUM_WORDS)])  # type: ignore[misc]
        for own in range(NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(heard) == NUM_THREADS * NUM_WORDS
    for own in range(NUM_THREADS):
        assert [number for by, number in heard if by == own] == list(range(NUM_WORDS))


def test_what_follows_from_a_word_is_heard_after_it() -> None:
    heard: list[str] = []

    def hear(number: int) -> None:
        if number < 3:
            mailbox.put(number + 1)
        heard.append(f"{number} is done")

    mailbox = Mailbox(hear)
    mailbox.put(1)
    assert heard == ["1 is done", "2 is done", "3 is done"]


def test_who_comes_while_another_is_heard_leaves_his_word_to_that_thread() -> None:
    began, may_end = threading.Event(), threading.Event()
    heard: list[tuple[str, threading.Thread]] = []

    def hear(word: str) -> None:
        began.set()
        may_end.wait(30)
        heard.append((word, threading.current_thread()))

    mailbox = Mailbox(hear)
    first = threading.Thread(target=mailbox.put, args=("first",))
    first.start()
    assert began.wait(30)
    mailbox.put("second")
    assert not heard, "nobody waits"
    assert not mailbox.freeze(timeout_seconds=0.01), "in the midst of a word"
    may_end.set()
    first.join(30)
    assert heard == [("first", first), ("second", first)]


def test_nothing_is_heard_once_it_is_frozen() -> None:
    heard: list[str] = []
    mailbox = Mailbox(heard.append)
    mailbox.put("before")
    assert mailbox.freeze(timeout_seconds=30)
    mailbox.put("after")
    assert heard == ["before"]
