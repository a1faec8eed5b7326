"""A state on its way from one rank to another: out of the tensors of the one, into those of the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from training import tensorfile
from training.checkpoints.snapshot import bytes_of
from training.documents import fast_digest
from training.errors import InfrastructureError
from training.memory.live import Live, Pieces
from training.memory.slots import HEADER_BYTES, Header, Held, entries_of, opened, sealed
from training.tensorfile import Layout

CHUNK_BYTES = 1 << 20
"""Of a message: small enough to be hashed while a cache has it."""
NUM_UNDER_WAY = 16
"""Messages at once, so that neither rank waits for the other between two."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What is told of a state before it comes."""

    header: Header
    num_head_bytes: int
    """Of the file, before its first tensor."""
    head_digest: str
    """xxh3-128."""


def give(held: Held, taker: int) -> None:
    """To a rank that calls `take`. Raises `RuntimeError` if it is lost."""
    under_way = deque[tuple[dist.Work, Tensor]]()
    for message in _messages(held):
        tensor = torch.frombuffer(message, dtype=torch.uint8)
        under_way.append((_begun(dist.isend(tensor, taker)), tensor))
        if len(under_way) == NUM_UNDER_WAY:
            under_way.popleft()[0].wait()
    for work, _ in under_way:
        work.wait()


def take(giver: int, places: Callable[[Layout], Mapping[str, Tensor]]) -> tuple[Live, Mapping[str, Tensor]]:
    """From a rank that calls `give`: the state, and the tensors that it lies in, which `places` gave for their shapes.

    Raises `InfrastructureError` if it did not arrive whole, and they hold anything then; `RuntimeError` if the rank is
    lost.
    """
    parcel = opened(Parcel, _received(HEADER_BYTES, giver))
    if parcel is None:
        raise InfrastructureError("what a state was announced by did not arrive whole")
    header, head = parcel.header, _received(parcel.num_head_bytes, giver)
    if fast_digest(head) != parcel.head_digest:
        raise InfrastructureError(f"the names in the state of step {header.step} did not arrive whole")
    tensors = places(tensorfile.layout(head))
    bodies = [bytes_of(tensor) for tensor in tensors.values()]
    journal = memoryview(bytearray(header.num_bytes - header.num_file_bytes))
    digest = xxhash.xxh3_128(head)
    for start, chunk in _arriving(Pieces([*bodies, journal]), giver):
        digest.update(chunk[: max(0, header.num_file_bytes - len(head) - start)])
    if (digest.hexdigest(), fast_digest(journal)) != (header.file_digest, header.journal_digest):
        raise InfrastructureError(f"the state of step {header.step} did not arrive whole")
    blank = replace(header, num_bytes=header.num_file_bytes, journal_digest="")
    return Live(blank=blank, pieces=[head, *bodies], entries=entries_of(journal), journal=journal), tensors


def _messages(held: Held) -> Iterator[memoryview]:
    """What a state is announced by, the head of its file, and the rest in chunks."""
    header, head = held.header, tensorfile.head(held.read)
    parcel = Parcel(header=header, num_head_bytes=len(head), head_digest=fast_digest(head))
    yield memoryview(bytearray(sealed(parcel)))
    yield head
    for start, stop in _chunks(len(head), header.num_bytes):
        yield held.read(start, stop)


def _received(num_bytes: int, giver: int) -> memoryview:
    place = memoryview(bytearray(num_bytes))
    _begin(place, giver).wait()
    return place


def _arriving(pieces: Pieces, giver: int) -> Iterator[tuple[int, memoryview]]:
    """Each chunk once it lies there, after where it begins."""
    under_way = deque[tuple[int, Sequence[memoryview], memoryview, dist.Work]]()

    def next_one() -> tuple[int, memoryview]:
        start, parts, place, work = under_way.popleft()
        work.wait()
        if len(parts) > 1:
            Pieces(parts).fill(place)
        return start, place

    for start, stop in _chunks(0, pieces.num_bytes):
        parts = pieces.parts(start, stop)
        place = parts[0] if len(parts) == 1 else memoryview(bytearray(stop - start))
        under_way.append((start, parts, place, _begin(place, giver)))
        if len(under_way) == NUM_UNDER_WAY:
            yield next_one()
    while under_way:
        yield next_one()


def _begin(place: memoryview, giver: int) -> dist.Work:
    """To receive a message."""
    return _begun(dist.irecv(torch.frombuffer(place, dtype=torch.uint8), giver))


def _begun(maybe_work: dist.Work | None) -> dist.Work:
    assert maybe_work is not None, "both ranks are of the group"
    return maybe_work


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + CHUNK_BYTES, stop)) for first in range(start, stop, CHUNK_BYTES))
