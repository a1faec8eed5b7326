"""A bucket: where it is, who speaks to it, and what is said of its errors."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from training.errors import InfrastructureError, MissingError, UnbrokenError, UserError
from training.s3.clients import Clients
from training.s3.errors import has_expired, translated, typed_errors
from training.s3.quickrequests import QuickRequests, make_connections

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from urllib3 import BaseHTTPResponse, PoolManager

NUM_TRIES = 6
FIRST_PAUSE_SECONDS = 0.2
ANSWER_SECONDS = 20.0
_STEPS = frozenset({".", ".."})


@dataclass(frozen=True, kw_only=True)
class StoreLocation:
    """Where objects live. Credentials come from the standard chain, never from here."""

    endpoint: str | None
    bucket: str
    prefix: str = ""
    region: str = "us-east-1"

    def uri(self, key: str = "") -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"


def pause(attempt: int) -> None:
    """Before a request that failed is tried again, for the first time after attempt 0."""
    time.sleep(FIRST_PAUSE_SECONDS * 2**attempt)


class Bucket:
    """One bucket, and a prefix in it."""

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

    def _key(self, key: str) -> str:
        """Raises `UserError` for a key that a client on the way might take for another one."""
        if not _STEPS.isdisjoint(key.split("/")):
            raise UserError(f"{self.location.uri(key)} is no name of an object: it has a step . or .. in it")
        return self.location.prefix + key

    def delete(self, key: str) -> None:
        with self._typed_errors(key):
            self._client.delete_object(Bucket=self.location.bucket, Key=self._key(key))

    def delete_soon(self, key: str) -> None:
        """One request, within `REQUEST_SECONDS` or not at all: a later try might come when it is no longer allowed."""
        with self._typed_errors(key):
            self._clients.impatient.delete_object(Bucket=self.location.bucket, Key=self._key(key))

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

    def _quick_reply(self, method: str, key: str, **request: Any) -> BaseHTTPResponse | None:
        return self._maybe_quick.ask(method, self._key(key), **request) if self._maybe_quick is not None else None

    def _require_key(self, key: str, reply: BaseHTTPResponse | None) -> None:
        """Raises `MissingError` if that is what the reply says."""
        if reply is not None and reply.status == 404 and b"<Code>NoSuchKey</Code>" in reply.data:
            raise MissingError(f"{self.location.uri(key)} does not exist")

    def _typed_errors(self, key: str) -> AbstractContextManager[None]:
        return typed_errors(lambda error: self._translated(error, key))

    def _translated(self, error: Exception, key: str) -> UnbrokenError:
        if has_expired(error):
            self.__dict__.pop("_clients", None)  # who asks next finds credentials that were renewed meanwhile
        return translated(error, self.location, key)
