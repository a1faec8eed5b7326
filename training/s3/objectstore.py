"""The store as all others see it: typed errors, digests checked, conditional writes that know their own.

Conditional writes carry a nonce in their body, and the client's own retries are off for them: a lost reply would
otherwise come back as a false refusal of one's own write (docs/protocols.md, "Conditional writes").
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from training.documents import canonical_json, digest_of, read_document, sha256_hex
from training.errors import DamagedError, InfrastructureError, MissingError, UnbrokenError, UserError
from training.s3.clients import Clients
from training.s3.errors import cut_short, has_expired, ignores, translated, typed_errors
from training.s3.quickrequests import (
    CHECKED,
    CONNECT_SECONDS,
    READ_SECONDS,
    Buffer,
    QuickRequests,
    checksum_of,
    is_whole,
    make_connections,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from urllib3 import BaseHTTPResponse, PoolManager

NUM_TRIES = 6
FIRST_PAUSE_SECONDS = 0.2
PIECE_BYTES = 1 << 18
ANSWER_SECONDS = 20.0
REQUEST_SECONDS = CONNECT_SECONDS + READ_SECONDS
"""After which a request that is not tried again has ended, one way or another."""

CONDITIONS = {"IfMatch": "if-match", "IfNoneMatch": "if-none-match"}
_OLD_NONCE = re.compile(r"[0-9a-f]{32}")
_STEPS = frozenset({".", ".."})
OUTCOMES = {200: "written", 412: "refused", 409: "again", **dict.fromkeys((500, 502, 503, 504), "unknown")}
"""Of a conditional write, by the reply's status."""


@cache
def shared_store(location: StoreLocation) -> Store:
    """This process's own, for all who need one: to make a client takes a twentieth of a second."""
    return Store(location)


@dataclass(frozen=True, kw_only=True)
class StoreLocation:
    """Where objects live. Credentials come from the standard chain, never from here."""

    endpoint: str | None
    bucket: str
    prefix: str = ""
    region: str = "us-east-1"

    def uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A JSON document and the ETag it was read with."""

    document: dict[str, Any]
    etag: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a listing tells of an object."""

    key: str
    num_bytes: int
    etag: str
    modified: datetime


class Store:
    """Objects under one bucket and prefix.

    Raises `MissingError` (no such key), `UserError` (no such bucket, no permission) and `InfrastructureError`
    (the server is away), each naming the object.
    """

    def __init__(self, location: StoreLocation) -> None:
        self.location = location

    def prepare(self) -> None:
        """Make what the first request would make, without one. Nothing of it hinders a fork."""
        _ = self._clients.patient, self._clients.credentials

    @cached_property
    def _clients(self) -> Clients:
        return Clients(endpoint=self.location.endpoint, region=self.location.region)

    @property
    def _client(self) -> S3Client:
        return self._clients.patient

    @cached_property
    def _maybe_quick(self) -> QuickRequests | None:
        where = self.location
        if where.endpoint is None:
            return None
        return QuickRequests(where.endpoint, where.bucket, where.region, lambda: self._clients.credentials)

    @cached_property
    def _connections(self) -> PoolManager:
        """For signed URLs."""
        return self._maybe_quick.connections if self._maybe_quick is not None else make_connections()

    def _signed_url(self, key: str) -> str:
        from botocore.exceptions import BotoCoreError

        request = {"Bucket": self.location.bucket, "Key": self._key(key)}
        try:
            return self._client.generate_presigned_url("get_object", Params=request, ExpiresIn=3600)
        except BotoCoreError as error:  # no credentials
            raise self._translated(error, key) from error

    def _key(self, key: str) -> str:
        """Raises `UserError` for a key that a client on the way might take for another one."""
        if not _STEPS.isdisjoint(key.split("/")):
            raise UserError(f"{self.location.uri(key)} is no name of an object: it has a step . or .. in it")
        return self.location.prefix + key

    # ---- plain objects -------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """The whole object."""
        reply = self._quick_reply("GET", key, headers=CHECKED)
        if reply is not None and reply.status == 200 and is_whole(reply):
            return reply.data
        self._require_key(key, reply)
        return self._read(key)

    def _require_key(self, key: str, reply: BaseHTTPResponse | None) -> None:
        """Raises `MissingError` if that is what the reply says."""
        if reply is not None and reply.status == 404 and b"<Code>NoSuchKey</Code>" in reply.data:
            raise MissingError(f"{self.location.uri(key)} does not exist")

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
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
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

    def _quick_reply(self, method: str, key: str, **request: Any) -> BaseHTTPResponse | None:
        return self._maybe_quick.ask(method, self._key(key), **request) if self._maybe_quick is not None else None

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
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
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

    def delete(self, key: str) -> None:
        with self._typed_errors(key):
            self._client.delete_object(Bucket=self.location.bucket, Key=self._key(key))

    def delete_soon(self, key: str) -> None:
        """One request, within `REQUEST_SECONDS` or not at all: a later try might come when it is no longer allowed."""
        with self._typed_errors(key):
            self._clients.impatient.delete_object(Bucket=self.location.bucket, Key=self._key(key))

    # ---- conditional writes --------------------------------------------------------------------------------------

    def read_versioned(self, key: str) -> Versioned:
        """A JSON document with the ETag that its replacement must name."""
        quick = self._quick_reply("GET", key, headers=CHECKED)
        if quick is not None and quick.status == 200 and is_whole(quick) and "ETag" in quick.headers:
            return Versioned(document=_parse(self.location.uri(key), quick.data), etag=quick.headers["ETag"])
        self._require_key(key, quick)
        with self._typed_errors(key):
            reply = self._client.get_object(Bucket=self.location.bucket, Key=self._key(key))
            return Versioned(document=_parse(self.location.uri(key), reply["Body"].read()), etag=reply["ETag"])

    def read_if_changed(self, key: str, *, etag: str) -> Versioned | None:
        """The document, or None if it still has this ETag; a store that honours If-None-Match then sends nothing."""
        quick = self._quick_reply("GET", key, headers={**CHECKED, "if-none-match": etag})
        if quick is not None and quick.status == 304:
            return None
        found = self.read_versioned(key)
        return found if found.etag != etag else None

    def create_versioned(self, key: str, document: dict[str, Any]) -> bool:
        """Create a JSON document; False if another writer's is there."""
        return self._write_once(key, {**document, "version": 1}, IfNoneMatch="*")

    def replace_versioned(self, key: str, document: dict[str, Any], *, read: Versioned) -> bool:
        """Replace the document that was `read`; False if another writer was first.

        The growing version and the nonce make every body different, so that an ETag never comes back (A-B-A).
        """
        version = int(read.document.get("version", 0)) + 1
        return self._write_once(key, {**document, "version": version}, IfMatch=read.etag)

    def _write_once(self, key: str, document: dict[str, Any], **condition: str) -> bool:
        nonce, body = _with_nonce(document)
        for attempt in range(NUM_TRIES):
            outcome = self._try_write(key, body, condition)
            if outcome == "written" or (outcome != "again" and self._holds_nonce(key, nonce)):
                return True
            if outcome == "refused":
                return False
            time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise InfrastructureError(f"{self.location.uri(key)} could not be written: the store does not answer")

    def _try_write(self, key: str, body: bytes, condition: dict[str, str]) -> str:
        """ "written", "refused" (the condition failed), "unknown" (no clear reply) or "again" (409)."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        if self._maybe_quick is not None:
            headers = {CONDITIONS[name]: value for name, value in condition.items()}
            status = self._maybe_quick.put_if(self._key(key), body, headers)
            if status in OUTCOMES:
                return OUTCOMES[status]
        client: Any = self._clients.impatient  # which names what is wrong
        try:
            client.put_object(Bucket=self.location.bucket, Key=self._key(key), Body=body, **condition)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status == 412:
                return "refused"
            if status == 409:
                return "again"
            if status == 501:
                raise ignores(self.location, "conditional writes (it answers 501)") from error
            if status >= 500:
                return "unknown"
            raise self._translated(error, key) from error
        except NoCredentialsError as error:
            raise self._translated(error, key) from error
        except BotoCoreError:
            return "unknown"
        return "written"

    def _holds_nonce(self, key: str, nonce: str) -> bool:
        try:
            return self.read_versioned(key).document.get("nonce") == nonce
        except MissingError:
            return False

    # ---- the store itself ----------------------------------------------------------------------------------------

    def create_bucket_if_missing(self) -> None:
        from botocore.exceptions import ClientError

        try:
            self._client.head_bucket(Bucket=self.location.bucket)
        except ClientError:
            with self._typed_errors(""):
                self._client.create_bucket(Bucket=self.location.bucket)

    def require_answer(self) -> None:
        """For those at a terminal. Raises `InfrastructureError` if the store says nothing at all for `ANSWER_SECONDS`.

        Everybody else asks again for minutes.
        """
        if self._maybe_quick is not None and self._maybe_quick.is_silent(ANSWER_SECONDS):
            raise InfrastructureError(
                f"the store at {self.location.endpoint} does not answer: it said nothing for {ANSWER_SECONDS:g} s"
            )

    def require_bucket(self) -> None:
        """Raises `UserError` if the bucket is missing or closed to us: a HEAD of an object cannot tell."""
        with self._typed_errors(""):
            self._client.list_objects_v2(Bucket=self.location.bucket, Prefix=self._key(""), MaxKeys=1)

    def probe(self) -> None:
        """Prove that this store honours create-only and If-Match. Raises `UserError` naming the store if not.

        Some stores ignore conditions (every racer wins), and no protocol can be built on those.
        """
        key = f"probe/{uuid.uuid4().hex}.json"
        try:
            self.create_versioned(key, {"probe": 1})
            first = self.read_versioned(key)
            self._expect(not self.create_versioned(key, {"probe": 2}), "create-only writes (If-None-Match)")
            self._expect(self.replace_versioned(key, {"probe": 3}, read=first), "conditional writes (If-Match)")
            self._expect(not self.replace_versioned(key, {"probe": 4}, read=first), "conditional writes (If-Match)")
        finally:
            self.delete(key)

    def _expect(self, honoured: bool, feature: str) -> None:
        if not honoured:
            raise ignores(self.location, feature)

    def _typed_errors(self, key: str) -> AbstractContextManager[None]:
        return typed_errors(lambda error: self._translated(error, key))

    def _translated(self, error: Exception, key: str) -> UnbrokenError:
        if has_expired(error):
            self.__dict__.pop("_clients", None)  # who asks next finds credentials that were renewed meanwhile
        return translated(error, self.location, key)


def _are_pieces_of(data: bytes | bytearray, pieces: Iterable[bytes]) -> bool:
    start = 0
    for piece in pieces:
        if not data.startswith(piece, start):
            return False
        start += len(piece)
    return start == len(data)


def _with_nonce(document: Mapping[str, Any]) -> tuple[str, bytes]:
    """A nonce, and the document with it. Behind its dot is the digest of all else: what was stored proves itself."""
    rest = {name: value for name, value in document.items() if name != "nonce"}
    nonce = f"{uuid.uuid4().hex}.{digest_of(rest)}"
    return nonce, canonical_json({**rest, "nonce": nonce})


def _parse(uri: str, data: bytes) -> dict[str, Any]:
    """Raises `DamagedError` unless it is what was written. Earlier releases wrote no digest."""
    document = read_document(data, what=uri)
    nonce = str(document.get("nonce", ""))
    _, dot, digest = nonce.partition(".")
    rest = {name: value for name, value in document.items() if name != "nonce"}
    if not (digest == digest_of(rest) if dot else _OLD_NONCE.fullmatch(nonce)):
        raise DamagedError(f"{uri} is damaged: it is not what was written there")
    if type(document.get("version")) is not int:
        raise DamagedError(f"{uri} is damaged: version: it is no number")
    return document
