"""The state in memory that outlives a worker: left behind when its group ends, taken up by the next.

The agent owns two slots per rank, in anonymous shared memory (memfd). A worker writes into the older one, the header
last, so that a copy that was cut short is never believed. A third is for what servers in the worker have beside the
state (training.servers.hosted). Imports no torch.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Protocol, TypeVar

from training.documents import canonical_json, fast_digest, parse, read_json
from training.errors import DamagedError
from training.runs.events import Entry

T = TypeVar("T")
HEADER_BYTES = 4096
JOURNAL_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a slot holds: a safetensors file, and after it the journal."""

    run_key: str
    generation: int
    step: int
    num_file_bytes: int
    num_bytes: int
    file_digest: str = ""
    """xxh3-128, as the next."""
    journal_digest: str = ""


class Held(Protocol):
    """A state that a rank has between two groups."""

    @property
    def header(self) -> Header:
        """With its digests."""
        ...

    @property
    def entries(self) -> Sequence[Entry]:
        """The journal."""
        ...

    @property
    def fingerprint(self) -> int:
        """Of the state, without the journal, whose times are each rank's own."""
        ...

    @property
    def step(self) -> int: ...

    def read(self, start: int, stop: int) -> memoryview:
        """Those bytes of the file with the journal after it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a slot holds."""

    header: Header
    body: memoryview
    """The file, and the journal."""

    @cached_property
    def entries(self) -> Sequence[Entry]:
        return entries_of(self.body[self.header.num_file_bytes :])

    @property
    def fingerprint(self) -> int:
        return fingerprint_of(self.header.file_digest)

    @property
    def step(self) -> int:
        return self.header.step

    def read(self, start: int, stop: int) -> memoryview:
        return self.body[start:stop]


def file_of(held: Held) -> memoryview:
    return held.read(0, held.header.num_file_bytes)


def progress_of(held: Held) -> int:
    """Grows with every step, and once more when its validation is noted: ranks may stop in between."""
    is_noted = not held.entries or "validation" in held.entries[-1].values
    return 2 * held.step + is_noted


def reaches_back_to(held: Held, step: int) -> bool:
    """Whether the journal tells of every step after that one."""
    return {entry.step for entry in held.entries} >= set(range(step + 1, held.step + 1))


def fingerprint_of(file_digest: str) -> int:
    """As a number that fits into an int64."""
    return int(file_digest[:15], 16)


def entries_of(journal: memoryview) -> list[Entry]:
    return [parse(Entry, document) for document in json.loads(bytes(journal))]


def journal_bytes(entries: Sequence[Entry]) -> bytes:
    return canonical_json([vars(entry) for entry in entries])


NUM_STATE_SLOTS = 2
SlotDescriptors = tuple[int, int, int]
"""The last one is for servers."""


def create_slots() -> SlotDescriptors:
    """Of memory that is there as long as somebody holds them."""
    names = ("unbroken-slot-0", "unbroken-slot-1", "unbroken-servers")
    first, second, servers = (os.memfd_create(name) for name in names)
    return first, second, servers


class Slots:
    """A rank's, by their file descriptors: two of the state, then those that are beside."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = descriptors[:NUM_STATE_SLOTS]
        self._others = descriptors[NUM_STATE_SLOTS:]
        self._maybe_last: int | None = None
        """The one that was written last here: of two of one step it is the newer one."""

    @property
    def of_servers(self) -> Slots:
        return Slots(self._others)

    def newest(self, run_key: str, generation: int) -> Memory | None:
        """The newest whole state of this run; None if there is none."""
        return next(self.whole(run_key, generation), None)

    def whole(self, run_key: str, generation: int) -> Iterator[Memory]:
        """All that are whole, the newest first."""
        for fd in sorted(self._descriptors, key=_step_of, reverse=True):
            if (memory := _read(fd, run_key, generation)) is not None:
                yield memory

    def write(self, header: Header, fill: Callable[[memoryview], None]) -> Memory:
        """Into the slot that is not the newest. `fill` writes the file and the journal into what it is given."""
        fd = min(self._descriptors, key=lambda fd: (_step_of(fd), fd == self._maybe_last))
        self._maybe_last = fd
        _unseal(fd)
        if os.fstat(fd).st_size < HEADER_BYTES + header.num_bytes:
            os.ftruncate(fd, HEADER_BYTES + header.num_bytes)
        body = _body(fd, header)
        fill(body)
        proven = _proving(header, body)
        os.pwrite(fd, sealed(proven), 0)
        return Memory(header=proven, body=body)

    def clear(self) -> None:
        """What was found is in use now, and changes; later it must not be found again."""
        self._maybe_last = None
        for fd in (*self._descriptors, *self._others):
            _unseal(fd)

    def clear_after(self, step: int) -> None:
        """What is newer than where a group began would stay, and what the group writes would give way to it."""
        for fd in self._descriptors:
            if _step_of(fd) > step:
                _unseal(fd)

    def reserve(self, num_bytes: int) -> None:
        """Have memory for so large a file and some journal ready: to write into pages that are there is several times
        quicker than into new ones. May go on beside `write`."""
        for fd in self._descriptors:
            with suppress(OSError):  # then there may be none when it is needed, and that is told there
                if os.fstat(fd).st_size < HEADER_BYTES + num_bytes:
                    os.posix_fallocate(fd, 0, HEADER_BYTES + num_bytes + JOURNAL_BYTES)


def _unseal(fd: int) -> None:
    """Nothing there is believed from now on."""
    if os.fstat(fd).st_size >= HEADER_BYTES:
        os.pwrite(fd, bytes(HEADER_BYTES), 0)


def _read(fd: int, run_key: str, generation: int) -> Memory | None:
    header = _header_of(fd)
    if header is None or (header.run_key, header.generation) != (run_key, generation):
        return None
    body = _body(fd, header)
    return Memory(header=header, body=body) if header == _proving(header, body) else None


def _body(fd: int, header: Header) -> memoryview:
    """Mapped page by page as it is used, it would take ten times as long."""
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    return memoryview(mmap.mmap(fd, HEADER_BYTES + header.num_bytes, flags=flags))[HEADER_BYTES:]


def _proving(header: Header, body: memoryview) -> Header:
    """With the digests of a body."""
    file, journal = body[: header.num_file_bytes], body[header.num_file_bytes :]
    return replace(header, file_digest=fast_digest(file), journal_digest=fast_digest(journal))


def _header_of(fd: int) -> Header | None:
    header = opened(Header, os.pread(fd, HEADER_BYTES, 0))
    is_as_long = header is not None and os.fstat(fd).st_size >= HEADER_BYTES + header.num_bytes
    return header if is_as_long else None


def _step_of(fd: int) -> int:
    header = _header_of(fd)
    return -1 if header is None else header.step


def sealed(value: Any) -> bytes:
    """A dataclass as HEADER_BYTES that prove themselves."""
    document = canonical_json(asdict(value))
    return canonical_json([document.decode(), fast_digest(document)]).ljust(HEADER_BYTES)


def opened(kind: type[T], data: bytes | memoryview) -> T | None:
    """The inverse of `sealed`; None if that is not what this is."""
    try:
        document, digest = read_json(bytes(data), what="it")
        is_whole = fast_digest(document.encode()) == digest
        return parse(kind, read_json(document, what="it")) if is_whole else None
    except (ValueError, TypeError, AttributeError, DamagedError):
        return None
