"""An object in S3 as a file: read piece by piece, so that memory stays bounded whatever its size."""

from __future__ import annotations

import io
from typing import Any

from training.s3.objectstore import Store

PIECE_BYTES = 4 << 20


class RemoteFile(io.RawIOBase):
    """Reads ahead by pieces. Raises `UserError` if the object is replaced while it is read."""

    def __init__(self, store: Store, key: str, *, num_bytes: int, etag: str) -> None:
        super().__init__()
        self._store = store
        self._key = key
        self._num_bytes = num_bytes
        self._etag = etag
        self._position = 0
        self._piece = b""
        self._piece_start = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self._num_bytes or not len(view):
            return 0
        if not self._piece_start <= self._position < self._piece_start + len(self._piece):
            stop = min(self._position + PIECE_BYTES, self._num_bytes)
            self._piece = self._store.get_range(self._key, self._position, stop, etag=self._etag)
            self._piece_start = self._position
        offset = self._position - self._piece_start
        count = min(len(view), len(self._piece) - offset)
        view[:count] = self._piece[offset : offset + count]
        self._position += count
        return count
