"""A state between two groups that lies in a rank's tensors, and is read from there."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from training.checkpoints.snapshot import Image
from training.documents import fast_digest
from training.memory.slots import Header, fingerprint_of, journal_bytes
from training.runs.events import Entry


@dataclass(frozen=True, kw_only=True)
class Live:
    """As a slot would hold it, but nothing is copied. Whoever changes the tensors makes it worthless."""

    blank: Header
    """Of the file alone, without the journal."""
    pieces: Sequence[memoryview]
    """Of the file."""
    entries: Sequence[Entry]
    journal: memoryview
    """Of these."""

    @property
    def step(self) -> int:
        return self.blank.step

    @property
    def fingerprint(self) -> int:
        return fingerprint_of(self.blank.file_digest)

    @cached_property
    def _all_pieces(self) -> Pieces:
        return Pieces([*self.pieces, self.journal])

    @property
    def header(self) -> Header:
        num_bytes = self.blank.num_file_bytes + len(self.journal)
        return replace(self.blank, num_bytes=num_bytes, journal_digest=fast_digest(self.journal))

    def read(self, start: int, stop: int) -> memoryview:
        return self._all_pieces.read(start, stop)


def live(*, run_key: str, generation: int, step: int, tensors: Mapping[str, Tensor], entries: Sequence[Entry]) -> Live:
    """What a rank has in its tensors. All that takes long is done here, before anybody waits for it."""
    image = Image(tensors)
    pieces = list(image.pieces())
    blank = Header(
        run_key=run_key,
        generation=generation,
        step=step,
        num_file_bytes=image.num_bytes,
        num_bytes=image.num_bytes,
        file_digest=fast_digest(*pieces),
    )
    journal = memoryview(bytearray(journal_bytes(entries)))
    return Live(blank=blank, pieces=pieces, entries=tuple(entries), journal=journal)


class Pieces:
    """Memory here and there, laid end to end."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._stops = list(accumulate(len(piece) for piece in self._pieces))
        self.num_bytes = self._stops[-1] if self._stops else 0

    def parts(self, start: int, stop: int) -> list[memoryview]:
        """Bytes [start, stop), where they lie."""
        found = []
        for number in range(bisect_right(self._stops, start), len(self._pieces)):
            piece = self._pieces[number]
            first = self._stops[number] - len(piece)
            if first >= stop:
                break
            found.append(piece[max(0, start - first) : stop - first])
        return found

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop); not copied if they lie in one piece."""
        found = self.parts(start, stop)
        return found[0] if len(found) == 1 else memoryview(bytearray().join(found))

    def put(self, place: memoryview) -> None:
        """All of them into as many bytes."""
        for piece, stop in zip(self._pieces, self._stops, strict=True):
            place[stop - len(piece) : stop] = piece

    def fill(self, data: memoryview) -> None:
        """All of them, with as many bytes."""
        for piece, stop in zip(self._pieces, self._stops, strict=True):
            piece[:] = data[stop - len(piece) : stop]
