"""The parsers of what comes over the network to `training`: from agents, from ranks, and from the store's server."""

from __future__ import annotations

import asyncio
import hmac
import io
import os
import socket
from collections.abc import Coroutine, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from torch import zeros

from tasks.prediction.kept import find_shards
from tests.fuzz.of_training import LEFT, MEMBER, RECORD, SAMPLE, document, head_of, with_head
from tests.fuzz.parser import DIGEST, Held, Parser
from tests.unit.tiny import Tiny
from training.arithmetic.reduce import Subtree
from training.checkpoints.continuation import find_siblings
from training.cluster.links import BROKEN, Place, _Connection
from training.cluster.protocol import Status
from training.data.versions import versions
from training.documents import canonical_json, parse
from training.errors import DamagedError, UnbrokenError
from training.memory.slots import Header, opened, sealed
from training.memory.transfer import Parcel
from training.runs.exposition import _answer
from training.runs.system import SampleReader
from training.s3.objectstore import Entry
from training.s3.quickrequests import TruncatedError, _entries
from training.servers.protocol import Pull, Push
from training.servers.shared import SharedReceiver
from training.servers.stale_protocol import Fresh
from training.servers.stale_state import Reading
from training.servers.wire import decode, encode

LISTING_ERRORS = (TruncatedError, SyntaxError, ValueError, LookupError)
"""Those of a page that is left to the S3 client (a `ParseError` is a `SyntaxError`)."""
STATUS = Status(
    member=MEMBER,
    token=3,
    phase="training",
    reaches=("j",),
    sees_store=True,
    is_leaving=False,
    step=4,
    maybe_departure=LEFT,
    maybe_news=RECORD,
)
HEADER = Header(
    run_key=DIGEST, generation=0, step=4, num_file_bytes=8, num_bytes=10, file_digest="a", journal_digest="b"
)
PLACE = canonical_json(asdict(Place(node=0, incarnation="i", address="10.0.0.1", port=4711)))
GREETING = b'{"incarnation": "b", "nonce": "n"}\n' + b"0" * 64 + b" {}\n"
PUSH = Push(token=1, step=4, parts=((Subtree(start=0, size=2), zeros(3)),))
MESSAGES = tuple(
    head + b"".join(map(bytes, tensors))
    for head, tensors in (
        encode(PUSH),
        encode(Pull(token=1)),
        encode(Fresh(token=1, clock=4, barrier=0, values=Reading(values=zeros(3), seen=(4, 5)))),
    )
)
HEADS = tuple(map(head_of, MESSAGES))
IN_MEMORY = ((1).to_bytes(8, "little") + encode(PUSH)[0], (0).to_bytes(8, "little") + MESSAGES[0])
"""In the first segment, and by the socket."""
SEGMENT_BYTES, MOST_SENT_BYTES = 4096, 1 << 16
LISTING = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
    b"</IsTruncated><EncodingType>url</EncodingType><Contents><Key>a%2Fb</Key><Size>9</Size><ETag>e</ETag>"
    b"<LastModified>2026-11-27T06:00:00Z</LastModified></Contents></ListBucketResult>"
)
XML_WORDS = (
    *(b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"&#0;", b"&#x110000;", b"<![CDATA[", b"]]>", b"<!--", b"<a>" * 3000),
    *(b"<Contents>", b"</Contents>", b"<Size>-1</Size>", b"<Size>1_0</Size>", b"%FF", b"%00", b"true", b"xmlns:a='b'"),
    *(b"<LastModified>2026-11-27T06:00:00</LastModified>", b"<LastModified>2026-11-27</LastModified>"),
    *(b"<?xml version='1.0' encoding='utf-16'?>", b"encoding='cp037'"),
)
NAMES = b"0-incarnation\n20-" + DIGEST.encode() + b"\n00000020-000003\n" + DIGEST.encode() + b".json"
NAME_WORDS = (b"\n", b"-", b"..", b"/", b"\xd9\xa1-", b"9" * 5000, b"\0", b"-1", b".json", b"00000020-000003", b" 1-")


def parsers() -> list[Parser]:
    return [
        Parser(name="what a state is announced by", seeds=(sealed(HEADER),), parse=announced, proves=True),
        Parser(name="an agent's place", seeds=(PLACE,), parse=lambda data: document(Place, data)),
        Parser(name="an agent's greeting", seeds=(GREETING,), parse=greeted, proves=True, errors=BROKEN),
        Parser(
            name="an agent's status", seeds=(canonical_json(asdict(STATUS)),), wrap=proven, parse=heard, errors=BROKEN
        ),
        Parser(
            name="a request for metrics",
            seeds=(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",),
            parse=asked,
            refuses=False,
        ),
        Parser(name="a listing of the store", seeds=(LISTING,), parse=listed, words=XML_WORDS, errors=LISTING_ERRORS),
        Parser(name="a parameter server's message", seeds=MESSAGES, parse=message),
        Parser(name="the head of a server's message", seeds=HEADS, wrap=with_head, parse=message),
        Parser(name="a message in memory", seeds=IN_MEMORY, parse=message_in_memory, errors=(UnbrokenError, OSError)),
        Parser(name="names in a listing", seeds=(NAMES,), parse=named, words=NAME_WORDS, refuses=False),
    ]


def announced(data: bytes) -> Any:
    found = opened(Header, data)
    if found is None and opened(Parcel, data) is None:
        raise DamagedError("it is neither")
    return found


def greeted(data: bytes) -> str:
    """An agent that is told this by whoever connects, and does not know the secret."""
    return run(_Connection(reader_of(data), _Silent(), b"secret", is_caller=False).greet("me"))  # type: ignore[arg-type]


def proven(body: bytes) -> bytes:
    """A line of somebody who knows the secret: the first on a connection whose key is empty."""
    body = body.replace(b"\n", b" ")
    return hmac.new(b"", b"1 0 " + body, sha256).hexdigest().encode() + b" " + body + b"\n"


def heard(data: bytes) -> Any:
    """From an agent that has greeted."""
    connection = _Connection(reader_of(data), _Silent(), b"secret", is_caller=False)  # type: ignore[arg-type]
    return parse(Status, run(connection.receive()))


def asked(data: bytes) -> bytes:
    """By whoever reaches an agent's metrics."""
    writer = _Silent()
    LOOP.run_until_complete(_answer(reader_of(data), writer, lambda: "text"))  # type: ignore[arg-type]
    return writer.written


LOOP = asyncio.new_event_loop()


def reader_of(data: bytes) -> asyncio.StreamReader:
    """Of a connection on which this comes, and no more."""
    reader = asyncio.StreamReader(limit=1 << 20, loop=LOOP)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class _Silent:
    """A writer that nobody listens to."""

    def __init__(self) -> None:
        self.transport: Any = self
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None: ...

    def close(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


def message(data: bytes) -> Any:
    """To a parameter server."""
    stream = io.BytesIO(data)

    def read_into(place: memoryview) -> None:
        if stream.readinto(place) != len(place):
            raise DamagedError("it ends")

    return type(decode(read_into, max_bytes=1 << 20))


def listed(page: bytes) -> Any:
    found = list(_entries(page))
    assert all(entry["Size"] >= 0 and entry["LastModified"].tzinfo is not None for entry in found), found
    return found


def message_in_memory(data: bytes) -> Any:
    """To a parameter server, from a process of its host, of whose memory it has one segment."""
    ours, theirs = socket.socketpair()
    descriptor = os.memfd_create("segment")
    with ours, theirs:
        os.truncate(descriptor, SEGMENT_BYTES)
        socket.send_fds(theirs, [data[:MOST_SENT_BYTES] or b"\0"], [descriptor])
        os.close(descriptor)
        theirs.shutdown(socket.SHUT_WR)
        return type(SharedReceiver(ours).receive(max_bytes=1 << 20))


LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)


class Named(Held):
    """With objects of these names, wherever it is looked."""

    def __init__(self, names: list[str]) -> None:
        super().__init__({"000000.jsonl": canonical_json(asdict(SAMPLE))})
        self._names = names

    def list_folders(self, prefix: str) -> list[str]:
        return self._names

    def list_keys(self, prefix: str) -> Iterator[tuple[str, int]]:
        return ((prefix + name, 1) for name in self._names)

    def list_entries(self, prefix: str) -> Iterator[Entry]:
        return (Entry(key=prefix + name, num_bytes=1, etag="", modified=LONG_AGO) for name in self._names)


def named(data: bytes) -> Any:
    """By whoever may write the bucket: read as numbers and digests, or passed over."""
    store = Named(data.decode(errors="surrogateescape").split("\n"))
    siblings = find_siblings(store, "t", run_key="k", recipe=Tiny(is_level=True), num_steps=9)
    return (
        list(SampleReader(store, "runs/").read_new()),
        [sibling.step for sibling in siblings],
        versions(store, "d"),
        find_shards(store, "models/"),
    )
