"""Single S3 requests by kept-alive connections, signed here: a tenth of what the client's cost, and none to be made.

There is no second try and no typed error: who gets no clear reply asks the client, which is patient and names what it
finds. For stores with an endpoint; where AWS is, only the client knows.
"""

from __future__ import annotations

import base64
import hmac
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote_plus, urlsplit
from xml.etree import ElementTree  # nosec B405 # see below

from training.documents import sha256_hex

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from urllib3 import BaseHTTPResponse, PoolManager

Buffer = bytes | bytearray | memoryview
NOTHING = sha256_hex(b"")
CONNECT_SECONDS = 5
READ_SECONDS = 30
MAX_CONNECTIONS = 8
CHECKED = {"x-amz-checksum-mode": "ENABLED"}
"""Asks for the CRC that an object was stored with."""


def make_connections() -> PoolManager:
    """Kept alive, and shared by threads; nothing is tried again."""
    from urllib3 import PoolManager, Timeout

    timeout = Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS)
    return PoolManager(maxsize=MAX_CONNECTIONS, retries=False, timeout=timeout)


class QuickRequests:
    """To one bucket. Shared by threads."""

    def __init__(self, endpoint: str, bucket: str, region: str, credentials: Callable[[], Credentials | None]) -> None:
        parts = urlsplit(endpoint)
        self._host = parts.netloc
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._bucket_url = f"{self._origin}{parts.path.rstrip('/')}/{bucket}"
        self._region = region
        self._credentials = credentials

    @cached_property
    def connections(self) -> PoolManager:
        return make_connections()

    def ask(
        self,
        method: str,
        key: str,
        *,
        body: Any = b"",
        sha256: str = NOTHING,
        headers: Mapping[str, str] | None = None,
        is_streamed: bool = False,
    ) -> BaseHTTPResponse | None:
        """The reply, whatever its status; None if there is none."""
        from urllib3.exceptions import HTTPError

        try:
            return self._request(method, self._url(key), body, sha256, headers, is_streamed)
        except HTTPError:
            return None

    def put_if(self, key: str, body: bytes, headers: Mapping[str, str]) -> int:
        """The status of a conditional PUT: 0 if nothing was sent, 500 if nobody knows whether it was applied."""
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, SSLError

        sent = {**headers, **checksum_of(body), "content-length": str(len(body))}
        try:
            return self._request("PUT", self._url(key), body, sha256_hex(body), sent, False).status
        except (ConnectTimeoutError, SSLError):  # nor was there a connection
            return 0
        except HTTPError:
            return 500

    def is_silent(self, seconds: float) -> bool:
        """Whether nothing comes back for so long; that there is no connection to be had is another matter."""
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        try:
            self.connections.request("HEAD", self._bucket_url, timeout=Timeout(connect=CONNECT_SECONDS, read=seconds))
        except ReadTimeoutError:
            return True
        except HTTPError:
            return False
        return False

    def list_page(self, prefix: str) -> list[dict[str, Any]] | None:
        """What is under `prefix`, as the client gives it; None if one page does not hold it."""
        from urllib3.exceptions import HTTPError

        url = f"{self._bucket_url}?encoding-type=url&list-type=2&prefix={quote(prefix, safe='-_.~')}"
        try:
            reply = self._request("GET", url, b"", NOTHING, None, False)
            return list(_entries(reply.data)) if reply.status == 200 else None
        except (HTTPError, ElementTree.ParseError, TruncatedError, ValueError, LookupError):  # of encodings, too
            return None

    def _url(self, key: str) -> str:
        return f"{self._bucket_url}/{quote(key, safe='/~')}"

    def _request(
        self, method: str, url: str, body: Any, sha256: str, headers: Mapping[str, str] | None, is_streamed: bool
    ) -> BaseHTTPResponse:
        signed = self._signed(method, url, sha256, headers or {})
        return self.connections.request(method, url, body=body, headers=signed, preload_content=not is_streamed)

    def _signed(self, method: str, url: str, sha256: str, headers: Mapping[str, str]) -> dict[str, str]:
        """These and Signature Version 4 of a request whose body has this digest. Without credentials, these alone.

        https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
        """
        credentials = self._credentials()
        if credentials is None:
            return dict(headers)
        frozen = credentials.get_frozen_credentials()
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        scope = f"{now[:8]}/{self._region}/s3/aws4_request"
        to_sign = {**headers, "host": self._host, "x-amz-content-sha256": sha256, "x-amz-date": now}
        if frozen.token:
            to_sign["x-amz-security-token"] = frozen.token
        path, _, query = url.removeprefix(self._origin).partition("?")
        lines = "".join(f"{name}:{to_sign[name].strip()}\n" for name in sorted(to_sign))
        names = ";".join(sorted(to_sign))
        canonical = sha256_hex(f"{method}\n{path}\n{query}\n{lines}\n{names}\n{sha256}".encode())
        key = _signing_key(frozen.secret_key, scope)
        signature = hmac.digest(key, f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{canonical}".encode(), "sha256").hex()
        signer = f"Credential={frozen.access_key}/{scope}, SignedHeaders={names}, Signature={signature}"
        return {**to_sign, "authorization": f"AWS4-HMAC-SHA256 {signer}"}


@lru_cache(maxsize=8)
def _signing_key(secret: str, scope: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key


def checksum_of(*pieces: Buffer) -> dict[str, str]:
    """The header by which the store refuses other bytes."""
    crc32 = 0
    for piece in pieces:
        crc32 = zlib.crc32(piece, crc32)
    return {"x-amz-checksum-crc32": base64.b64encode(crc32.to_bytes(4, "big")).decode()}


def is_whole(reply: BaseHTTPResponse) -> bool:
    """Whether a body is what the store was given, if that can be told: as the client looks too."""
    return all(reply.headers.get(name, value) == value for name, value in checksum_of(reply.data).items())


class TruncatedError(Exception):
    """A listing goes on."""


def _entries(page: bytes) -> Iterator[dict[str, Any]]:
    if b"<!" in page:
        raise TruncatedError  # entities, which may stand for gigabytes; a listing has none
    root = ElementTree.fromstring(page)  # nosec B314 # entities were refused
    space = root.tag.partition("}")[0] + "}" if root.tag.startswith("{") else ""
    if root.findtext(f"{space}IsTruncated") != "false" or root.findtext(f"{space}EncodingType") != "url":
        raise TruncatedError
    for item in root.iterfind(f"{space}Contents"):
        told = {child.tag.removeprefix(space): child.text or "" for child in item}
        num_bytes, modified = int(told["Size"]), datetime.fromisoformat(told["LastModified"])
        if num_bytes < 0 or modified.tzinfo is None:
            raise ValueError(f"a listing says {told}")
        yield {"Key": unquote_plus(told["Key"]), "Size": num_bytes, "ETag": told["ETag"], "LastModified": modified}
