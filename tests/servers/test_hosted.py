"""What a process that ends leaves of its replicas: all that they have acknowledged, and nothing half done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.servers.test_arithmetic import SIZES, Net, adamw
from training.arithmetic.reduce import Subtree
from training.servers import hosted as hosted_module
from training.servers import mesh as mesh_module
from training.servers.arithmetic import Decision, TensorState
from training.servers.endpoints import Begun
from training.servers.hosted import Hosted, leave, left_copies
from training.servers.layout import shards
from training.servers.mesh import Mesh
from training.servers.protocol import Apply, Assignment, Held, Push, Send
from training.servers.replica import Replica

(SHARD,) = shards(SIZES, 1)
NUM_ELEMENTS = sum(SIZES)


def mesh_of(name: str) -> Mesh:
    return Mesh(name, secret="s", address="127.0.0.1", max_bytes=1 << 26)


def state_of() -> TensorState:
    net = Net()
    return TensorState(adamw(net), list(net.parameters()), SHARD)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that is slow to end what it does has acknowledged it all the same."""
    monkeypatch.setattr(hosted_module, "FREEZE_SECONDS", 120.0)
    monkeypatch.setattr(mesh_module, "HANDSHAKE_SECONDS", 100.0)


@pytest.fixture
def worker() -> Iterator[Mesh]:
    mesh = mesh_of("worker")
    yield mesh
    mesh.close()


@pytest.fixture
def hosted(worker: Mesh) -> Iterator[Hosted]:
    """The only replica of the only shard, which takes from one virtual worker."""
    mesh, state = mesh_of("server"), state_of()
    replica = Replica(mesh.name, state, num_virtual_workers=1)
    replica.fill()
    made = Hosted(mesh, replica, state, lambda token, maybe_error: None)
    places = {one.name: one.address for one in (mesh, worker)}
    made.begin(Begun(assignment=Assignment(token=1, primary="server", backups=()), places=places))
    worker.begin(1, places)
    yield made
    made.close()


def push(step: int) -> Send:
    total = torch.full([NUM_ELEMENTS + 1], 0.5)
    return Send(to="server", message=Push(token=1, step=step, parts=((Subtree(0, 1), total),)))


def test_what_was_acknowledged_is_in_what_is_left(hosted: Hosted, worker: Mesh) -> None:
    worker.send([push(1)])
    assert isinstance(worker.inbox.get(timeout=120)[1], Held)
    data = b"".join(leave({0: hosted}))
    assert hosted.num_bytes() <= len(data)
    copy = left_copies(memoryview(data))[0]
    assert copy.position == 1
    other = Replica("other", state_of(), num_virtual_workers=1)
    other.take(copy)
    assert other.position == 1
    assert torch.equal(other.state.values(), hosted.replica.state.values())
    assert torch.equal(other.copy().maybe_total, torch.full([NUM_ELEMENTS + 1], 0.5))


def test_who_has_left_acknowledges_nothing_more(hosted: Hosted, worker: Mesh) -> None:
    copies = left_copies(memoryview(b"".join(leave({0: hosted}))))
    worker.send([push(1)])
    with pytest.raises(queue.Empty):
        worker.inbox.get(timeout=0.5)
    assert hosted.replica.position == copies[0].position == 0


def test_a_replica_in_the_midst_of_something_leaves_nothing(
    hosted: Hosted, worker: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosted_module, "FREEZE_SECONDS", 0.1)
    begun, ended = threading.Event(), threading.Event()

    def fold(*_: object) -> torch.Tensor:
        begun.set()
        ended.wait(120)
        return torch.zeros(NUM_ELEMENTS + 1)

    monkeypatch.setattr(hosted.replica.state, "fold", fold)
    worker.send([push(1)])
    assert begun.wait(120)
    assert left_copies(memoryview(b"".join(leave({0: hosted})))) == {}
    ended.set()


def test_a_replica_that_failed_in_the_midst_of_a_step_leaves_nothing(
    hosted: Hosted, worker: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be stepped again where it was stepped already."""
    failed = threading.Event()

    def step(*_: object) -> None:
        with torch.no_grad():
            hosted._state._pieces[0].add_(1.0)
        failed.set()
        raise MemoryError

    monkeypatch.setattr(hosted._state.optimizer, "step", step)
    worker.send([push(1)])
    worker.inbox.get(timeout=120)
    decision = Decision(grad_norm=1.0, clip_norm=None, learning_rate_scale=1.0, extras=torch.zeros(1))
    worker.send([Send(to="server", message=Apply(token=1, step=1, decision=decision))])
    assert failed.wait(120)
    assert left_copies(memoryview(b"".join(leave({0: hosted})))) == {}


def test_an_empty_replica_leaves_nothing() -> None:
    mesh, state = mesh_of("server"), state_of()
    empty = Hosted(mesh, Replica(mesh.name, state, num_virtual_workers=1), state, lambda token, maybe_error: None)
    assert left_copies(memoryview(b"".join(leave({0: empty})))) == {}
    empty.close()
