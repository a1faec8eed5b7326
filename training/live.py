"""The state of a rank whose process stays from one group to the next: in its tensors, and read from there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from training.documents import fast_digest
from training.slots import Entry, Header, fingerprint_of, journal_bytes
from training.snapshot import Image


class Live:
    """As a slot would hold it, but nothing is copied. Whoever changes the tensors makes it worthless."""

    def __init__(
        self, *, run_key: str, generation: int, step: int, tensors: Mapping[str, Tensor], entries: Sequence[Entry]
    ) -> None:
        image = Image(tensors)
        self._pieces = list(image.pieces())
        self._blank = Header(
            run_key=run_key,
            generation=generation,
            step=step,
            num_file_bytes=image.num_bytes,
            num_bytes=image.num_bytes,
            file_digest=fast_digest(*self._pieces),
        )
        self._entries = tuple(entries)

    @property
    def step(self) -> int:
        return self._blank.step

    @property
    def entries(self) -> Sequence[Entry]:
        return self._entries

    @property
    def fingerprint(self) -> int:
        return fingerprint_of(self._blank.file_digest)

    @cached_property
    def _journal(self) -> memoryview:
        return memoryview(bytearray(journal_bytes(self._entries)))

    @property
    def header(self) -> Header:
        num_bytes = self._blank.num_file_bytes + len(self._journal)
        return replace(self._blank, num_bytes=num_bytes, journal_digest=fast_digest(self._journal))

    def read(self, start: int, stop: int) -> memoryview:
        return read_pieces([*self._pieces, self._journal], start, stop)


def read_pieces(pieces: Sequence[memoryview], start: int, stop: int) -> memoryview:
    """Bytes [start, stop) of pieces laid end to end; not copied if they lie in one of them."""
    stops = list(accumulate(len(piece) for piece in pieces))
    found = []
    for number in range(bisect_right(stops, start), len(pieces)):
        first = stops[number] - len(pieces[number])
        if first >= stop:
            break
        found.append(pieces[number][max(0, start - first) : stop - first])
    return found[0] if len(found) == 1 else memoryview(bytearray().join(found))
