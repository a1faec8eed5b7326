"""What a fuzzed parser is, and a store that holds whatever an input says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from training.documents import read_document
from training.errors import MissingError, UnbrokenError
from training.s3.objectstore import Entry, Store, StoreLocation, Versioned

DIGEST = "0123456789abcdef" * 4


@dataclass(frozen=True, kw_only=True)
class Parser:
    """`parse` raises `errors` for what it refuses. What `proves` itself is refused unless it means the same."""

    name: str
    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], Any]
    wrap: Callable[[bytes], bytes] | None = None
    """Makes an input of what was changed: lengths and sums are right again, so that more than these is looked at."""
    words: tuple[bytes, ...] = ()
    """That the format has of its own."""
    proves: bool = False
    refuses: bool = True
    """Whether there is anything that it would not take."""
    most_kilobytes: int = 400 << 10
    """That it may add to this process at its highest."""
    errors: tuple[type[Exception], ...] = field(default=(UnbrokenError,))


class Held(Store):
    """A store with these objects under every key that ends so. Digests are taken for right: whoever writes the bucket
    may give an object the name that it needs."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        super().__init__(StoreLocation(endpoint="http://127.0.0.1:1", bucket="bucket"))
        self._objects = objects

    def get(self, key: str) -> bytes:
        found = next((data for end, data in self._objects.items() if key.endswith(end)), None)
        if found is None:
            raise MissingError(f"{key} does not exist")
        return found

    def fetch(self, key: str) -> bytes:
        return self.get(key)

    def list_entries(self, prefix: str) -> Iterator[Entry]:
        yield Entry(key=f"{prefix}{DIGEST}", num_bytes=1, etag="etag", modified=datetime.now(UTC))

    def get_proven(self, key: str, *, sha256: str) -> bytes:
        return self.get(key)

    def read_versioned(self, key: str) -> Versioned:
        return Versioned(document=read_document(self.get(key), what=self.location.uri(key)), etag="etag")

    def list_folders(self, prefix: str) -> list[str]:
        return ["0-i", "i-0", "-", "\u0661-i"]

    def list_keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((f"{prefix}{DIGEST}.json", 1) for _ in range(1))


class MemoryFile:
    """A file without a name, for parsers that are given a path."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("input")
        self.path = Path(f"/proc/self/fd/{self._descriptor}")

    def holding(self, data: bytes) -> Path:
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, data, 0)
        return self.path
