"""Messages come whole and in order, from those alone who know the secret; the end of a connection is told."""

from __future__ import annotations

import gc
import os
import queue
import select
import selectors
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.servers.talker import NUM_ELEMENTS, NUM_WHOLE
from tests.shared_memory import names_mapped_by
from tests.waiting import wait_until
from training.arithmetic.reduce import Subtree
from training.errors import DamagedError
from training.servers import mesh as mesh_module
from training.servers.arithmetic import Decision, Report
from training.servers.mesh import Lost, Mesh
from training.servers.outbox import Outbox
from training.servers.protocol import Apply, Copy, Held, Hold, Message, Pull, Push, Send
from training.servers.shared import SharedReceiver
from training.servers.streams import StreamReceiver, StreamSender
from training.servers.wire import decode, encode

MAX_BYTES = 1 << 24
NUM_NORMS = 1 << 14
NUM_ROUNDS = 3
NAMES = ("taker", "known one", "known other")
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


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With greetings: who is slow is not lost."""
    monkeypatch.setattr(mesh_module, "HANDSHAKE_SECONDS", 100.0)


@pytest.fixture(params=["memory", "sockets"])
def transport(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def pair(transport: str) -> Iterator[tuple[Mesh, Mesh]]:
    """Who listens at all addresses has no name for the one that it is reached by, as on another host."""
    address = "127.0.0.1" if transport == "memory" else "0.0.0.0"
    meshes = [Mesh(name, secret="known", address=address, max_bytes=MAX_BYTES) for name in ("one", "other")]
    places = {mesh.name: ("127.0.0.1", mesh.address[1]) for mesh in meshes}
    for mesh in meshes:
        mesh.begin(3, places)
    yield meshes[0], meshes[1]
    for mesh in meshes:
        mesh.close()


def test_messages_keep_their_order(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=message) for message in MESSAGES])
    for message in MESSAGES:
        sender, found = other.inbox.get(timeout=120)
        assert sender == "one"
        assert same(found, message)


def long_message(step: int) -> Hold:
    return Hold(token=3, step=step, total=torch.full([NUM_ELEMENTS], float(step)))


SEGMENT = "memfd:unbroken-message"


def mappings() -> Counter[int]:
    """How often each segment is mapped in this process, by its inode, but for those that nobody refers to any more.
    Meshes of tests before may be giving theirs back."""
    gc.collect()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if SEGMENT in line]
    return Counter(int(inode) for _, _, _, _, inode, *_ in lines)


def descriptors() -> Counter[int]:
    """Likewise."""
    found: Counter[int] = Counter()
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own is closed by now
            if SEGMENT in os.readlink(entry):
                found[entry.stat().st_ino] += 1
    return found


def test_long_messages_stay_as_they_came_for_as_long_as_they_are_kept(pair: tuple[Mesh, Mesh], transport: str) -> None:
    """And no longer: their memory is used again."""
    one, other = pair
    before = mappings()
    for _ in range(NUM_ROUNDS):
        one.send([Send(to="other", message=long_message(step)) for step in range(6)])
        kept = [other.inbox.get(timeout=120)[1] for _ in range(6)]
        assert [float(message.total.unique()) for message in kept] == list(range(6))  # type: ignore[union-attr]
        del kept
    own = mappings() - before
    assert set(own.values()) <= {2}, "of sender and receiver"
    assert len(own) in (range(6, 6 + NUM_ROUNDS) if transport == "memory" else [0]), (
        "who heard the last may hold it yet"
    )
    wait_until(lambda: descriptors() - before == own, what="one descriptor for each, which Python keeps")


def test_a_peer_that_dies_in_the_midst_of_a_message_has_said_those_before(
    pair: tuple[Mesh, Mesh], transport: str
) -> None:
    _, other = pair
    mapped_before = mappings()
    host, port = ("127.0.0.1", str(other.address[1]))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.servers.talker", "other", host, port], stdout=subprocess.PIPE, text=True
    ) as talker:
        assert talker.stdout is not None
        assert talker.stdout.readline() == "half\n"
        assert not names_mapped_by([talker.pid]), "nothing of it can be left"
        talker.kill()
    assert talker.returncode == -9
    for step in range(NUM_WHOLE):
        _, message = other.inbox.get(timeout=120)
        assert isinstance(message, Hold)
        assert message.step == step
        assert torch.equal(message.total, torch.full([NUM_ELEMENTS], float(step)))
    assert bool(mappings() - mapped_before) == (transport == "memory")
    assert other.inbox.get(timeout=120) == ("talker", Lost(token=3))


def test_whose_name_is_taken_is_heard_by_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes it does not know the secret."""
    monkeypatch.setattr(mesh_module, "_local_name", lambda address: f"\0unbroken-taken-{os.getpid()}")
    meshes = [Mesh(name, secret=name[:5], address="127.0.0.1", max_bytes=MAX_BYTES) for name in NAMES]
    places = {mesh.name: mesh.address for mesh in meshes}
    _, one, other = meshes
    for mesh in (one, other):
        mesh.begin(3, places)
    one.send([Send(to=other.name, message=long_message(7))])
    sender, message = other.inbox.get(timeout=120)
    assert sender == one.name
    assert isinstance(message, Hold)
    for mesh in meshes:
        mesh.close()


def test_who_takes_a_name_and_hands_on_what_is_said_there_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs are of one way alone: those for the local socket are none for the one by TCP."""
    name = f"\0unbroken-relayed-{os.getpid()}"
    monkeypatch.setattr(mesh_module, "_local_name", lambda address: name)
    heard = bytearray()
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(name)
        taken.listen()
        meshes = [Mesh(name, secret="known", address="127.0.0.1", max_bytes=MAX_BYTES) for name in ("one", "other")]
        one, other = meshes
        relaying = threading.Thread(target=_relay, args=(taken, other.address, heard))
        relaying.start()
        for mesh in meshes:
            mesh.begin(3, {mesh.name: mesh.address for mesh in meshes})
        one.send([Send(to="other", message=long_message(7))])
        sender, message = other.inbox.get(timeout=120)
        relaying.join(120)
    assert sender == "one"
    assert isinstance(message, Hold)
    assert 0 < len(heard) < 1000, "it heard the greeting, and nothing after it"
    for mesh in meshes:
        mesh.close()


def _relay(taken: socket.socket, address: tuple[str, int], heard: bytearray) -> None:
    """Between the first who comes and that address."""
    here, _ = taken.accept()
    with here, socket.create_connection(address) as there, selectors.DefaultSelector() as ready:
        ready.register(here, selectors.EVENT_READ, there)
        ready.register(there, selectors.EVENT_READ, here)
        while True:
            for key, _ in ready.select():
                data = cast(socket.socket, key.fileobj).recv(1 << 16)
                if not data:
                    return
                heard += data if key.fileobj is here else b""
                key.data.sendall(data)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_heard_at_a_local_socket() -> None:
    mesh = Mesh("one", secret="known", address="127.0.0.1", max_bytes=MAX_BYTES)
    call = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + sys.argv[1]);"
        " sys.exit(len(s.recv(16)))"
    )
    name = mesh_module._local_name(mesh.address)[1:]
    for user, num_bytes in ((65534, 0), (0, 16)):
        done = subprocess.run(["python3", "-I", "-c", call, name], user=user, check=False, timeout=120)
        assert done.returncode == num_bytes
    mesh.close()


def test_no_more_may_wait_to_be_proven_than_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "MAX_UNPROVEN", 1)
    mesh = Mesh("one", secret="known", address="127.0.0.1", max_bytes=MAX_BYTES)
    with socket.create_connection(mesh.address) as first:
        assert first.recv(16, socket.MSG_WAITALL)
        with socket.create_connection(mesh.address) as second:
            assert second.recv(16) == b""
    mesh.close()


def test_a_greeting_that_drips_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh_module, "HANDSHAKE_SECONDS", 0.5)
    mesh = Mesh("one", secret="known", address="127.0.0.1", max_bytes=MAX_BYTES)
    with socket.create_connection(mesh.address) as dripping:
        assert dripping.recv(16, socket.MSG_WAITALL)
        with pytest.raises(OSError, match=r"reset|pipe"):  # not for as long as a byte comes in time
            _drip(dripping)
    mesh.close()


def _drip(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b"\0")
        select.select([connection], [], [], 0.05)


def test_a_snapshot_takes_no_memory_that_stays(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    before = mappings()
    one.send([Send(to="other", message=replace(MESSAGES[-1], snapshot={"values": torch.ones(NUM_ELEMENTS)}))])
    assert isinstance(other.inbox.get(timeout=120)[1], Copy)
    assert not mappings() - before


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ((1).to_bytes(8, "little") + as_bytes(Pull(token=1)), "in segment 1, where they are not"),
        ((0).to_bytes(8, "little") + b"\xff" * 8, "begins with"),
    ],
)
def test_what_lies_in_no_segment_is_refused(data: bytes, why: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        with pytest.raises(DamagedError, match=why):
            SharedReceiver(ours).receive(max_bytes=MAX_BYTES)


@pytest.mark.parametrize(("num_bytes", "why"), [(0, "cannot be mapped"), (4096, "in segment 1, where they are not")])
def test_a_segment_that_is_too_short_is_refused(num_bytes: int, why: str) -> None:
    ours, theirs = socket.socketpair()
    descriptor = os.memfd_create("short")
    os.ftruncate(descriptor, num_bytes)
    head, _ = encode(long_message(1))
    with ours, theirs:
        socket.send_fds(theirs, [(1).to_bytes(8, "little"), head], [descriptor])
        os.close(descriptor)
        with pytest.raises(DamagedError, match=why):
            SharedReceiver(ours).receive(max_bytes=MAX_BYTES)


class Slow:
    """A sender whose peer takes nothing for a while, and less at a time than a message has."""

    def __init__(self) -> None:
        self.connection, self.theirs = socket.socketpair()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._sender = StreamSender(self.connection)
        self.send, self.maybe_buffers = self._sender.send, self._sender.maybe_buffers


def test_what_is_short_keeps_its_place_among_the_rest_though_it_would_wait() -> None:
    """The socket takes a part of the first ones, then none of any."""
    slow, outbox = Slow(), Outbox()
    messages: list[Message] = [
        Held(token=3, step=step, report=Report(norms=torch.full([NUM_NORMS], float(step)), extras=torch.empty(0)))
        for step in range(20)
    ]
    thread = threading.Thread(target=outbox.deliver, args=(slow,))
    thread.start()
    for message in messages[:1]:
        outbox.put(message)
    receiver = StreamReceiver(slow.theirs)
    found = [receiver.receive(max_bytes=MAX_BYTES)]
    for message in messages[1:]:
        outbox.put(message)
    outbox.end()
    found += [receiver.receive(max_bytes=MAX_BYTES) for _ in messages[1:]]
    assert [message.step for message in found] == list(range(20))  # type: ignore[attr-defined]
    assert all(same(one, other) for one, other in zip(found, messages, strict=True))
    thread.join(120)
    slow.connection.close()
    slow.theirs.close()


def test_the_end_of_a_peer_is_told(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=MESSAGES[0])])
    other.inbox.get(timeout=120)
    one.begin(4, {})
    assert other.inbox.get(timeout=120) == ("one", Lost(token=3))


def test_who_cannot_be_reached_is_lost(pair: tuple[Mesh, Mesh]) -> None:
    one, _ = pair
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        gone = nobody.getsockname()
    one.begin(4, {"other": gone})
    one.send([Send(to="other", message=Pull(token=4))])
    assert one.inbox.get(timeout=120) == ("other", Lost(token=4))


def test_who_does_not_know_the_secret_is_not_heard(pair: tuple[Mesh, Mesh]) -> None:
    _, other = pair
    stranger = Mesh("one", secret="guessed", address="127.0.0.1", max_bytes=MAX_BYTES)
    stranger.begin(3, {"other": other.address})
    stranger.send([Send(to="other", message=MESSAGES[0])])
    assert stranger.inbox.get(timeout=120) == ("other", Lost(token=3))
    with pytest.raises(queue.Empty):
        other.inbox.get_nowait()
    stranger.close()


def test_meshes_of_one_process_need_no_connection() -> None:
    here: dict[str, Mesh] = {}
    meshes = [Mesh(name, secret="s", address="127.0.0.1", max_bytes=1, here=here) for name in ("one", "other")]
    one, other = meshes
    places = {mesh.name: mesh.address for mesh in meshes}
    for mesh in meshes:
        mesh.begin(3, places)
    message = long_message(1)
    one.send([Send(to=name, message=message) for name in ("other", "one")])
    for mesh in meshes:
        sender, found = mesh.inbox.get(timeout=120)
        assert (sender, found is message) == ("one", True)
    other.close()
    one.send([Send(to="other", message=message)])
    assert one.inbox.get(timeout=120) == ("other", Lost(token=3))
    one.close()


def test_messages_of_another_token_are_not_sent(pair: tuple[Mesh, Mesh]) -> None:
    one, other = pair
    one.send([Send(to="other", message=Pull(token=2)), Send(to="other", message=MESSAGES[0])])
    assert other.inbox.get(timeout=120)[1] == MESSAGES[0]


@pytest.mark.parametrize("is_connected", [False, True])
def test_what_cannot_be_said_is_told_as_a_loss(
    pair: tuple[Mesh, Mesh], caplog: pytest.LogCaptureFixture, is_connected: bool
) -> None:
    """Or whoever asked would wait for it for ever."""
    one, other = pair
    if is_connected:
        one.send([Send(to="other", message=Pull(token=3))])
        other.inbox.get(timeout=120)
    unsayable = Held(token=3, step=7, report=object())
    one.send([Send(to="other", message=unsayable)])
    assert one.inbox.get(timeout=120) == ("other", Lost(token=3))
    assert "could not say something to other" in caplog.text
