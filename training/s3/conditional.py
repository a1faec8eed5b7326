"""Conditional writes that know their own.

They carry a nonce in their body, and the client's own retries are off for them: a lost reply would otherwise come back
as a false refusal of one's own write (docs/protocols.md, "Conditional writes").
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.documents import canonical_json, digest_of, read_document
from training.errors import DamagedError, InfrastructureError, MissingError
from training.s3.bucket import NUM_TRIES, Bucket, pause
from training.s3.errors import ignores
from training.s3.quickrequests import CHECKED, is_whole

CONDITIONS = {"IfMatch": "if-match", "IfNoneMatch": "if-none-match"}
_OLD_NONCE = re.compile(r"[0-9a-f]{32}")
OUTCOMES = {200: "written", 412: "refused", 409: "again", **dict.fromkeys((500, 502, 503, 504), "unknown")}
"""Of a conditional write, by the reply's status."""


@dataclass(frozen=True, kw_only=True)
class Versioned:
    """A JSON document and the ETag it was read with."""

    document: dict[str, Any]
    etag: str


class ConditionalWrites(Bucket):
    """JSON documents that several write, one after another."""

    def read_versioned(self, key: str) -> Versioned:
        """A JSON document with the ETag that its replacement must name."""
        quick = self._quick_reply("GET", key, headers=CHECKED)
        if quick is not None and quick.status == 200 and is_whole(quick) and "ETag" in quick.headers:
            return Versioned(document=parse_versioned(self.location.uri(key), quick.data), etag=quick.headers["ETag"])
        self._require_key(key, quick)
        with self._typed_errors(key):
            reply = self._client.get_object(Bucket=self.location.bucket, Key=self._key(key))
            return Versioned(document=parse_versioned(self.location.uri(key), reply["Body"].read()), etag=reply["ETag"])

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
        nonce, body = with_nonce(document)
        for attempt in range(NUM_TRIES):
            outcome = self._try_write(key, body, condition)
            if outcome == "written" or (outcome != "again" and self._holds_nonce(key, nonce)):
                return True
            if outcome == "refused":
                return False
            pause(attempt)
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


def with_nonce(document: Mapping[str, Any]) -> tuple[str, bytes]:
    """A nonce, and the document with it. Behind its dot is the digest of all else: what was stored proves itself."""
    rest = {name: value for name, value in document.items() if name != "nonce"}
    nonce = f"{uuid.uuid4().hex}.{digest_of(rest)}"
    return nonce, canonical_json({**rest, "nonce": nonce})


def parse_versioned(uri: str, data: bytes) -> dict[str, Any]:
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
