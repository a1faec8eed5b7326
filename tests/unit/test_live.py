"""What is read of a living state is, to the byte, what a slot would hold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoints.snapshot import Image
from training.memory.live import Live, Pieces, live
from training.memory.slots import Header, Slots, file_of, journal_bytes, progress_of, reaches_back_to
from training.runs.events import Entry

TENSORS = {
    "model.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "model.count": torch.tensor(7),
    "model.none": torch.empty(0),
    "optimizer.m": torch.linspace(0, 1, 1000, dtype=torch.float64),
}
ENTRIES = [Entry(time=float(step), step=step, values={"loss": 0.5}) for step in (4, 5)]


def held_live() -> Live:
    return live(run_key="k", generation=0, step=5, tensors=TENSORS, entries=ENTRIES)


def test_it_is_the_same_as_in_a_slot(slots: Slots) -> None:
    image, journal = Image(TENSORS), journal_bytes(ENTRIES)
    header = Header(
        run_key="k",
        generation=0,
        step=5,
        num_file_bytes=image.num_bytes,
        num_bytes=image.num_bytes + len(journal),
    )

    def fill(body: memoryview) -> None:
        image.write(body[: image.num_bytes])
        body[image.num_bytes :] = journal

    memory = slots.write(header, fill)
    assert memory is not None
    held = held_live()
    assert (held.header, held.fingerprint, held.step) == (memory.header, memory.fingerprint, memory.step)
    assert file_of(held) == file_of(memory)
    assert held.read(0, held.header.num_bytes) == memory.body
    assert list(held.entries) == list(memory.entries)
    assert progress_of(held) == progress_of(memory)
    assert reaches_back_to(held, 3)
    assert not reaches_back_to(held, 2)


@given(st.lists(st.binary(max_size=9), max_size=9), st.data())
def test_any_bytes_of_pieces_are_those_of_the_whole(pieces: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(pieces)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert Pieces([memoryview(piece) for piece in pieces]).read(start, stop) == whole[start:stop]


def test_what_lies_in_one_piece_is_not_copied() -> None:
    piece = bytearray(b"abcdef")
    found = Pieces([memoryview(b"x"), memoryview(piece)]).read(2, 5)
    piece[2] = ord("!")
    assert found == b"b!d"


@given(st.lists(st.integers(0, 9), max_size=9))
def test_pieces_are_filled_as_they_are_read(lengths: list[int]) -> None:
    places = [bytearray(length) for length in lengths]
    pieces = Pieces([memoryview(place) for place in places])
    whole = bytes(range(sum(lengths)))
    pieces.fill(memoryview(whole))
    assert pieces.num_bytes == len(whole)
    assert pieces.read(0, len(whole)) == b"".join(places) == whole
