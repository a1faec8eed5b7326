"""The store as all others see it: typed errors, digests checked, conditional writes that know their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from training.documents import sha256_hex
from training.errors import DamagedError, MissingError, UserError
from training.s3.bucket import NUM_TRIES, StoreLocation, pause
from training.s3.conditional import ConditionalWrites, Versioned
from training.s3.errors import cut_short
from training.s3.quickrequests import CHECKED, CONNECT_SECONDS, READ_SECONDS, Buffer, checksum_of, is_whole

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

__all__ = ["REQUEST_SECONDS", "Buffer", "Entry", "Store", "StoreLocation", "Versioned", "shared_store"]

PIECE_BYTES = 1 << 18
REQUEST_SECONDS = CONNECT_SECONDS + READ_SECONDS
"""After which a request that is not tried again has ended, one way or another."""


@cache
def shared_store(location: StoreLocation) -> Store:
    """This process's own, for all who need one: to make a client takes a twentieth of a second."""
    return Store(location)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a listing tells of an object."""

    key: str
    num_bytes: int
    etag: str
    modified: datetime


class Store(ConditionalWrites):
    """Objects under one bucket and prefix.

    Raises `MissingError` (no such key), `UserError` (no such bucket, no permission) and `InfrastructureError`
    (the server is away), each naming the object.
    """

    def get(self, key: str) -> bytes:
        """The whole object."""
        reply = self._quick_reply("GET", key, headers=CHECKED)
        if reply is not None and reply.status == 200 and is_whole(reply):
            return reply.data
        self._require_key(key, reply)
        return self._read(key)

    def get_range(self, key: str, start: int, stop: int, *, etag: str) -> bytes:
        """Bytes [start, stop) of an object that must still be the one with this ETag. Raises `UserError` if not."""
        try:
            return self._read(key, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)
        except MissingError as error:
            raise UserError(f"{self.location.uri(key)} was removed while it was read: start again") from error

    def _read(self, key: str, **request: str) -> bytes:
        """A body cut short is fetched again: boto3 itself would not."""
        client: Any = self._client
        for attempt in range(NUM_TRIES):
            with self._typed_errors(key):
                try:
                    reply = client.get_object(Bucket=self.location.bucket, Key=self._key(key), **request)
                    body: bytes = reply["Body"].read()
                    return body
                except cut_short():
                    if attempt == NUM_TRIES - 1:
                        raise
            pause(attempt)
        raise AssertionError("unreachable")

    def fetch(self, key: str) -> bytes:
        """The whole object by the quicker way, for bytes that the caller verifies (shards): kept-alive connections, and
        none of the client's own checksums.

        Whatever goes wrong there is left to `get`, which is patient and names what it finds.
        """
        reply = self._unchecked_reply(key, is_streamed=False)
        return reply.data if reply is not None and reply.status == 200 else self.get(key)

    def holds(self, key: str, data: bytes | bytearray) -> bool:
        """Whether the object is exactly these bytes: read back as by `fetch`, but in pieces, and never held whole."""
        from urllib3.exceptions import HTTPError

        reply = self._unchecked_reply(key, is_streamed=True)
        if reply is not None:
            with suppress(HTTPError), reply:
                if reply.status == 200:
                    return _are_pieces_of(data, reply.stream(PIECE_BYTES))
        return self.get(key) == data

    def _unchecked_reply(self, key: str, *, is_streamed: bool) -> BaseHTTPResponse | None:
        from urllib3.exceptions import HTTPError

        if self._maybe_quick is not None:
            return self._maybe_quick.ask("GET", self._key(key), is_streamed=is_streamed)
        with suppress(HTTPError):
            return self._connections.request("GET", self._signed_url(key), preload_content=not is_streamed)
        return None

    def get_proven(self, key: str, *, sha256: str) -> bytes:
        """The whole object, whose digest must match. Raises `DamagedError`."""
        data = self.get(key)
        if sha256_hex(data) != sha256:
            raise DamagedError(f"{self.location.uri(key)} is damaged: its sha256 is not {sha256}")
        return data

    def put(self, key: str, data: bytes | bytearray) -> None:
        """One PUT, overwriting."""
        with self._typed_errors(key):
            body: Any = data
            self._client.put_object(Bucket=self.location.bucket, Key=self._key(key), Body=body)

    def put_proven(self, key: str, data: bytes | bytearray, *, sha256: str) -> None:
        """One PUT, and what it left read back, so no checksum need go along. Raises `DamagedError` if that differs."""
        self._put_quickly(key, (data,), sha256=sha256, headers={})
        if not self.holds(key, data):
            raise DamagedError(f"{self.location.uri(key)} was read back with other bytes than were written")

    def send(self, key: str, *pieces: Buffer, sha256: str) -> None:
        """One PUT by the quicker way, for bytes whose sha256 is known, whole or in pieces. The store refuses others.

        It checks the CRC-32 that is sent along, and AWS the sha256 too, which is signed. SeaweedFS looks only at a
        checksum that is named as such; a sha256 would cost it a sixth of a PUT's CPU, which a CRC-32 does not.
        """
        self._put_quickly(key, pieces, sha256=sha256, headers=checksum_of(*pieces))

    def _put_quickly(self, key: str, pieces: Sequence[Buffer], *, sha256: str, headers: dict[str, str]) -> None:
        """Whatever goes wrong here is left to `put`, which is patient and names what it finds."""
        sized = {**headers, "content-length": str(sum(map(len, pieces)))}
        reply = self._quick_reply("PUT", key, body=pieces, sha256=sha256, headers=sized)
        if reply is None or reply.status != 200:
            self.put(key, b"".join(pieces))

    def put_immutable(self, key: str, *pieces: Buffer, sha256: str | None = None) -> bool:
        """Create an object whose name decides its bytes (and whose digest may be known); False if it is there already.

        What is there already is read back, and overwritten if its bytes are wrong: to keep it would keep damage
        for ever, since an exact rerun makes the same name.
        """
        if self.exists(key) and self.holds(key, b"".join(pieces)):
            return False
        if sha256 is None:
            self.put(key, b"".join(pieces))
        else:
            self.send(key, *pieces, sha256=sha256)
        return True

    def create_immutable(self, key: str, data: bytes) -> bool:
        """The same for what several may make at once: one of them writes it, and the others get False."""
        for attempt in range(NUM_TRIES):
            outcome = self._try_write(key, data, {"IfNoneMatch": "*"})
            if outcome == "written":
                return True
            if outcome == "refused":
                return self.put_immutable(key, data)
            pause(attempt)
        return self.put_immutable(key, data)

    def exists(self, key: str) -> bool:
        """Exactly this key (a listing by prefix would also find its longer neighbours)."""
        reply = self._quick_reply("HEAD", key)
        if reply is not None and reply.status in (200, 404):
            return reply.status == 200
        try:
            with self._typed_errors(key):
                self._client.head_object(Bucket=self.location.bucket, Key=self._key(key))
        except MissingError:
            return False
        return True

    def list_keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every (key, bytes) under `prefix`, in the order of keys."""
        for entry in self.list_entries(prefix):
            yield entry.key, entry.num_bytes

    def list_entries(self, prefix: str) -> Iterator[Entry]:
        """Every object under `prefix`, in the order of the store's listing."""
        maybe_all = self._maybe_quick.list_page(self._key(prefix)) if self._maybe_quick is not None else None
        if maybe_all is not None:
            yield from map(self._entry, maybe_all)
            return
        with self._typed_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.location.bucket, Prefix=self._key(prefix)
            )
            for page in pages:
                yield from map(self._entry, page.get("Contents", []))

    def _entry(self, item: Mapping[str, Any]) -> Entry:
        key = item["Key"][len(self.location.prefix) :]
        return Entry(key=key, num_bytes=item["Size"], etag=item["ETag"], modified=item["LastModified"])

    def list_folders(self, prefix: str) -> list[str]:
        """The names directly under `prefix` (which ends in a slash), without looking inside them.

        A store that has real folders (SeaweedFS) names one for some minutes after the last object in it is gone.
        """
        with self._typed_errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.location.bucket, Prefix=self._key(prefix), Delimiter="/"
            )
            start = len(self._key(prefix))
            return [item["Prefix"][start:-1] for page in pages for item in page.get("CommonPrefixes", [])]

    def _signed_url(self, key: str) -> str:
        from botocore.exceptions import BotoCoreError

        request = {"Bucket": self.location.bucket, "Key": self._key(key)}
        try:
            return self._client.generate_presigned_url("get_object", Params=request, ExpiresIn=3600)
        except BotoCoreError as error:  # no credentials
            raise self._translated(error, key) from error


def _are_pieces_of(data: bytes | bytearray, pieces: Iterable[bytes]) -> bool:
    start = 0
    for piece in pieces:
        if not data.startswith(piece, start):
            return False
        start += len(piece)
    return start == len(data)
