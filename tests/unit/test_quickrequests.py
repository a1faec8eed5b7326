"""Requests that no client makes: signed as AWS says, believed only if whole, and a listing only if it is all there."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from time import struct_time
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.credentials import Credentials
from urllib3 import BaseHTTPResponse

from training.errors import InfrastructureError, MissingError
from training.s3.objectstore import Store, StoreLocation
from training.s3.quickrequests import NOTHING, QuickRequests, TruncatedError, _entries

EXAMPLE = "https://examplebucket.s3.amazonaws.com"


@pytest.mark.parametrize(
    ("path", "headers", "signature"),
    [
        ("/test.txt", {"range": "bytes=0-9"}, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("/?lifecycle=", {}, "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("/?max-keys=2&prefix=J", {}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_a_signature_is_that_of_the_documentation(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str], signature: str
) -> None:
    """The examples of docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html."""
    monkeypatch.setattr("training.s3.quickrequests.time.gmtime", lambda: struct_time((2013, 5, 24, 0, 0, 0, 4, 144, 0)))
    keys = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    signed = QuickRequests(EXAMPLE, "", "us-east-1", lambda: keys)._signed("GET", EXAMPLE + path, NOTHING, headers)
    assert signed["authorization"].endswith(f"Signature={signature}")


def test_a_session_token_is_signed_too() -> None:
    quick = QuickRequests(EXAMPLE, "", "us-east-1", lambda: Credentials("a", "b", "token"))
    signed = quick._signed("GET", f"{EXAMPLE}/x", NOTHING, {})
    assert signed["x-amz-security-token"] == "token"
    assert "x-amz-security-token" in signed["authorization"]


def test_a_body_that_is_not_what_was_stored_is_not_believed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", b'{"a":1}')
    store.create_versioned("y", {"a": 1})
    request = store._connections.request
    damaged: list[str] = []

    def damaging(method: str, url: str, **options: Any) -> BaseHTTPResponse:
        reply: Any = request(method, url, **options)
        reply._body = b'{"a":2}'
        damaged.append(method)
        return reply  # type: ignore[no-any-return]

    monkeypatch.setattr(store._connections, "request", damaging)
    assert store.get("x") == b'{"a":1}'
    assert store.read_versioned("y").document["a"] == 1
    assert damaged == ["GET", "GET"]


def test_a_listing_that_goes_on_is_left_to_the_client(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("list/ü +%.json", "list/a", "list/b"):
        store.put(key, b"abc")
    found = list(store.list_entries("list/"))
    assert [entry.key for entry in found] == ["list/a", "list/b", "list/ü +%.json"]
    assert {entry.num_bytes for entry in found} == {3}
    assert abs((found[0].modified - datetime.now(UTC)).total_seconds()) < 3600
    monkeypatch.setattr("training.s3.quickrequests.QuickRequests.list_page", lambda self, prefix: None)
    assert list(store.list_entries("list/")) == found
    for told in ("<IsTruncated>true</IsTruncated><EncodingType>url</EncodingType>", "<IsTruncated>false</IsTruncated>"):
        with pytest.raises(TruncatedError):
            list(_entries(f"<ListBucketResult>{told}</ListBucketResult>".encode()))


def test_a_listing_in_no_known_encoding_is_left_to_the_client(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("list/a", b"abc")
    asked = []

    def request(_: object, method: str, *__: object) -> SimpleNamespace:
        asked.append(method)
        return SimpleNamespace(status=200, data=b"<?xml version='1.0' encoding='utf-99'?><ListBucketResult/>")

    monkeypatch.setattr("training.s3.quickrequests.QuickRequests._request", request)
    assert [entry.key for entry in store.list_entries("list/")] == ["list/a"]
    assert asked == ["GET"]


def test_what_is_missing_needs_no_client(store: Store) -> None:
    other = Store(store.location)
    with pytest.raises(MissingError, match="/none does not exist"):
        other.get("none")
    with pytest.raises(MissingError, match="/none does not exist"):
        other.read_versioned("none")
    assert other.create_versioned("new", {})
    assert not other.create_versioned("new", {})
    assert not {"patient", "impatient"} & set(vars(other._clients))


def test_a_silent_store_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.s3.bucket.ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        endpoint = f"http://127.0.0.1:{frozen.getsockname()[1]}"
        with pytest.raises(InfrastructureError, match=f"the store at {endpoint} does not answer"):
            Store(StoreLocation(endpoint=endpoint, bucket="b")).require_answer()
    Store(StoreLocation(endpoint=endpoint, bucket="b")).require_answer()  # refused: whoever asks next is told
    Store(StoreLocation(endpoint=None, bucket="b")).require_answer()


@pytest.mark.parametrize(("was", "now"), [(b"<Size>9", b"<Size>-9"), (b"00Z</LastM", b"00</LastM")])
def test_a_listing_that_cannot_be_is_left_to_the_client(was: bytes, now: bytes) -> None:
    page = (
        b"<ListBucketResult><IsTruncated>false</IsTruncated><EncodingType>url</EncodingType><Contents><Key>a</Key>"
        b"<Size>9</Size><ETag>e</ETag><LastModified>2026-11-27T06:00:00Z</LastModified></Contents></ListBucketResult>"
    )
    assert len(list(_entries(page))) == 1
    with pytest.raises(ValueError, match="a listing says"):
        list(_entries(page.replace(was, now)))
