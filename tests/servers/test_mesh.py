"""Messages come whole and in order, from those alone who know the secret; the end of a connection is told."""

from __future__ import annotations

import queue
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from training.arithmetic.reduce import Subtree
from training.errors import DamagedError
from training.servers.arithmetic import Decision, Report
from training.servers.mesh import Lost, Mesh
from training.servers.protocol import Apply, Copy, Held, Message, Pull, Push, Send
from training.servers.wire import decode, encode

MAX_BYTES = 1 << 24
DECISION = Decision(grad_norm=0.1 + 0.2, clip_norm=None, learning_rate_scale=1e-300, extras=torch.tensor([2.0]))
MESSAGES: list[Message] = [
    Pull(token=3),
    Push(token=3, step=7, parts=((Subtree(0, 2), torch.arange(5.0)), (Subtree(2, 1), torch.empty(0)))),
    Held(token=3, step=7, report=Report(norms=torch.tensor([0.1]), extras=torch.zeros(2))),
    Apply(token=3, step=7, decision=DECISION),
    Copy(
        token=3,
        position=13,
        snapshot={"values": torch.ones(3), "optimizer": {0: {"step": torch.tensor(1.0), "count": 4}}},
        maybe_total=None,
        maybe_decision=None,
    ),
]


def same(one: Any, other: Any) -> bool:
    """Tensors cannot be compared by ==."""
    return repr(one) == repr(other)


class Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_into(self, view: memoryview) -> None:
        if len(view) > len(self._data):
            raise ConnectionError("the end")
        view[:], self._data = self._data[: len(view)], self._data[len(view) :]


def as_bytes(message: Message) -> bytes:
    head, buffers = encode(message)
    return head + b"".join(bytes(buffer) for buffer in buffers)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_as_it_was(message: Message) -> None:
    assert same(decode(Bytes(as_bytes(message)).read_into, max_bytes=MAX_BYTES), message)


def head_of(body: str) -> bytes:
    from training import tensorfile

    return tensorfile.header([], __metadata__={"message": body})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff" * 8, "begins with"),
        (head_of('{"Subtree":{"size":1,"start":0}}'), "a message is a Subtree"),
        (head_of('{"Pull":{"token":"3"}}'), "token = '3'"),
        (head_of('{"Pull":{}}'), "cannot be"),
        (head_of('{"Popen":{"args":"x"}}'), "cannot be"),
        (head_of('{"Pull":{"token":{"tensor":9}}}'), "cannot be"),
        (as_bytes(MESSAGES[1]).replace(b"F32", b"F64"), "damaged"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(DamagedError, match=why):
        decode(Bytes(data).read_into, max_bytes=MAX_BYTES)


def test_more_bytes_than_there_can_be_are_refused() -> None:
    with pytest.raises(DamagedError, match="more than 8 bytes"):
        decode(Bytes(as_bytes(MESSAGES[1])).read_into, max_bytes=8)


@pytest.fixture
def pair() -> Iterator[tuple[Mesh, Mesh]]:
    meshes = [Mesh(name, secret="known", address="127.0.0.1", max_bytes=MAX_BYTES) for name in ("one", "other")]
    places = {mesh.name: mesh.address for mesh in meshes}
    for mesh in meshes:
        mesh.begin(3, places)
    yield meshes[0], meshes[1]
    for mesh in meshes:
        mesh.close()


def test_messages_keep_their_order(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=message) for message in MESSAGES])
    for message in MESSAGES:
        sender, found = other.inbox.get(timeout=30)
        assert sender == "one"
        assert same(found, message)


def test_the_end_of_a_peer_is_told(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=MESSAGES[0])])
    other.inbox.get(timeout=30)
    one.begin(4, {})
    assert other.inbox.get(timeout=30) == ("one", Lost(token=3))


def test_who_cannot_be_reached_is_lost(pair: tuple[Mesh, Mesh]) -> None:
    one, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = nobody.getsockname()
    one.begin(4, {"other": gone})
    one.send([Send(to="other", message=Pull(token=4))])
    assert one.inbox.get(timeout=30) == ("other", Lost(token=4))


def test_who_does_not_know_the_secret_is_not_heard(pair: tuple[Mesh, Mesh]) -> None:
    _, other = pair
    stranger = Mesh("one", secret="guessed", address="127.0.0.1", max_bytes=MAX_BYTES)
    stranger.begin(3, {"other": other.address})
    stranger.send([Send(to="other", message=MESSAGES[0])])
    assert stranger.inbox.get(timeout=30) == ("other", Lost(token=3))
    with pytest.raises(queue.Empty):
        other.inbox.get_nowait()
    stranger.close()


def test_messages_of_another_token_are_not_sent(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=Pull(token=2)), Send(to="other", message=MESSAGES[0])])
    assert other.inbox.get(timeout=30)[1] == MESSAGES[0]


def test_what_cannot_be_said_is_told_as_a_loss(pair: tuple[Mesh, Mesh], caplog: pytest.LogCaptureFixture) -> None:
    """Or whoever asked would wait for it for ever."""
    one, _ = pair
    unsayable = Held(token=3, step=7, report=object())
    one.send([Send(to="other", message=unsayable)])
    assert one.inbox.get(timeout=60) == ("other", Lost(token=3))
    assert "could not say something to other" in caplog.text
