"""State in memory that outlives a worker: whole or not at all, whatever happened while it was written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from training.documents import canonical_json, fast_digest
from training.memory.slots import (
    HEADER_BYTES,
    Entry,
    Header,
    Memory,
    SlotDescriptors,
    Slots,
    create_slots,
    file_of,
    journal_bytes,
    opened,
    reaches_back_to,
)

FILE = bytes(range(200))
Descriptors = SlotDescriptors


@pytest.fixture
def descriptors() -> Iterator[Descriptors]:
    made = create_slots()
    yield made
    for fd in made:
        os.close(fd)


def write(
    slots: Slots,
    step: int,
    *,
    key: str = "k",
    told_since: int = 0,
    die_at: int | None = None,
) -> None:
    """Dies by its own hand once it has written so many bytes."""
    journal = journal_bytes([Entry(time=1.5, step=s, values={"loss": s / 8}) for s in range(told_since + 1, step + 1)])
    data = bytes([step]) + FILE

    def fill(body: memoryview) -> None:
        for place, byte in enumerate(data + journal):
            if place == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            body[place] = byte

    header = Header(run_key=key, generation=0, step=step, num_file_bytes=len(data), num_bytes=len(data) + len(journal))
    slots.write(header, fill)


def found(slots: Slots) -> Memory | None:
    return slots.newest("k", 0)


def step_of(slots: Slots) -> int | None:
    memory = found(slots)
    return None if memory is None else memory.step


def test_what_is_left_is_found(descriptors: Descriptors) -> None:
    slots = Slots(descriptors)
    assert found(slots) is None
    for step in (3, 4, 5):
        write(slots, step)
        memory = found(Slots(descriptors))
        assert memory is not None
        assert (memory.step, bytes(file_of(memory))) == (step, bytes([step]) + FILE)
        assert [(entry.step, entry.values["loss"]) for entry in memory.entries] == [
            (s, s / 8) for s in range(1, step + 1)
        ]


def test_the_journal_must_reach_back_far_enough(descriptors: Descriptors) -> None:
    slots = Slots(descriptors)
    write(slots, 9, told_since=4)
    memory = found(slots)
    assert memory is not None
    assert [since for since in range(10) if reaches_back_to(memory, since)] == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(("key", "generation"), [("other", 0), ("k", 1)])
def test_another_runs_state_is_not_taken(descriptors: Descriptors, key: str, generation: int) -> None:
    slots = Slots(descriptors)
    write(slots, 3)
    assert slots.newest(key, generation) is None


def test_no_flipped_byte_is_believed(descriptors: Descriptors) -> None:
    """Of header, file or journal: then the other slot is taken."""
    slots = Slots(descriptors)
    write(slots, 3)
    write(slots, 4)
    newest = descriptors[1]
    whole = os.pread(newest, 1 << 20, 0)
    header = whole[:HEADER_BYTES].rstrip()
    for place in [*range(len(header)), *range(HEADER_BYTES, len(whole))]:
        os.pwrite(newest, bytes([whole[place] ^ 1 << place % 8]), place)
        assert step_of(slots) == 3, place
        os.pwrite(newest, whole[place : place + 1], place)
    assert step_of(slots) == 4


def test_a_shortened_slot_is_not_believed(descriptors: Descriptors) -> None:
    slots = Slots(descriptors)
    write(slots, 3)
    write(slots, 4)
    size = os.fstat(descriptors[1]).st_size
    for length in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, size - 1):
        os.ftruncate(descriptors[1], length)
        assert step_of(slots) == 3
        write(slots, 4)
        assert step_of(slots) == 4


@pytest.mark.parametrize("die_at", [0, 1, 100, 201, 250])
def test_a_worker_killed_while_it_writes_leaves_what_was_there(descriptors: Descriptors, die_at: int) -> None:
    slots = Slots(descriptors)
    write(slots, 3)
    write(slots, 4)
    process = multiprocessing.get_context("fork").Process(
        target=write, args=(slots, 5), kwargs={"die_at": die_at, "told_since": 0}
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert step_of(slots) == 4
    write(slots, 5)
    assert step_of(slots) == 5


def test_what_is_cleared_is_not_found(descriptors: Descriptors) -> None:
    slots = Slots(descriptors)
    for step in (4, 5):
        write(slots, step)
    slots.clear()
    assert found(slots) is None


@pytest.mark.parametrize("data", [b"[" * HEADER_BYTES, b'["' + b"[" * 4000 + b'", ""]', b"[1, 2]", b"{}", b"9" * 4096])
def test_what_is_no_sealed_document_is_none(data: bytes) -> None:
    assert opened(Header, data) is None


def test_a_sealed_document_that_is_deep_is_none() -> None:
    deep = "[" * 2000
    assert opened(Header, canonical_json([deep, fast_digest(deep.encode())])) is None
