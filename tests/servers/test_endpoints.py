"""Who asks all shards hears what they answer, or why they do not; all in one process, where no thread is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

from training.arithmetic.reduce import Subtree
from training.servers.endpoints import Begun, PrimaryLost, Remote, Server
from training.servers.mesh import Lost, Mesh
from training.servers.protocol import Assignment
from training.servers.replica import Replica

NAMES = ("server 0", "server 1")
TOKEN = 3


class Adding:
    """A shard that is the sum of all totals."""

    def __init__(self) -> None:
        self.step = 0
        self.sum = torch.zeros(1)

    def fold(self, parts: list[tuple[Subtree, Any]]) -> Any:
        ((_, part),) = parts
        return part

    def with_said(self, total: Any, said: Any) -> Any:
        return total + said

    def report(self, total: Any) -> Any:
        return total

    def apply(self, total: Any, decision: Any) -> None:
        self.sum, self.step = self.sum + total * decision, self.step + 1

    def values(self) -> Any:
        return self.sum

    changes = snapshot = values

    def load(self, snapshot: Any, step: int) -> None:
        raise NotImplementedError


class Shards:
    """Two, and a worker."""

    def __init__(self, stack: ExitStack) -> None:
        here: dict[str, Mesh] = {}
        self.troubles: list[tuple[int, Exception | None]] = []
        self.states = [Adding() for _ in NAMES]
        self.meshes = {
            name: stack.enter_context(closing(Mesh(name, secret="s", address="127.0.0.1", max_bytes=1, here=here)))
            for name in (*NAMES, "worker")
        }
        self._places = {name: mesh.address for name, mesh in self.meshes.items()}
        for name, state in zip(NAMES, self.states, strict=True):
            replica = Replica(name, state, num_virtual_workers=1)
            replica.fill()
            server = Server(self.meshes[name], replica, lambda token, error: self.troubles.append((token, error)))
            assignment = Assignment(token=TOKEN, primary=name, backups=())
            server.begin(Begun(assignment=assignment, places=self._places))

    def remote(self, decide: Callable[[Any], Any]) -> Remote:
        return Remote(
            self.meshes["worker"],
            token=TOKEN,
            primaries=NAMES,
            places=self._places,
            decide=decide,
            patience_seconds=0.2,
        )


@pytest.fixture
def shards() -> Iterator[Shards]:
    with ExitStack() as stack:
        yield Shards(stack)


def parts(value: float) -> list[tuple[Subtree, torch.Tensor]]:
    return [(Subtree(0, 1), torch.tensor([value]))]


def test_shards_may_have_their_parts_one_after_another(shards: Shards) -> None:
    remote = shards.remote(lambda reports: sum(reports))
    for step in (1, 2):
        remote.push(step, 1, parts(2.0))
        assert [state.step for state in shards.states] == [step - 1, step - 1]
        remote.push(step, 0, parts(3.0))
        decision, values = remote.finish()
        assert (float(decision), [float(value) for value in values]) == (5.0, [15.0 * step, 10.0 * step])


def test_who_gave_one_shard_nothing_has_no_answer(shards: Shards) -> None:
    remote = shards.remote(len)
    remote.push(1, 1, parts(2.0))
    with pytest.raises(PrimaryLost, match="no server answered"):
        remote.finish()
    assert [state.step for state in shards.states] == [0, 0]


def test_an_error_of_the_decision_is_raised_by_who_waits_for_it(shards: Shards) -> None:
    def decide(reports: Any) -> None:
        raise ArithmeticError("it cannot be decided")

    with pytest.raises(ArithmeticError, match="cannot be decided"):
        shards.remote(decide).step(1, [parts(2.0), parts(3.0)])
    assert [state.step for state in shards.states] == [0, 0]
    assert shards.troubles == []


def test_an_error_on_a_server_is_its_end(shards: Shards) -> None:
    def fail(*_: Any) -> None:
        raise ArithmeticError("it cannot be applied")

    shards.states[1].apply = fail  # type: ignore[method-assign]
    remote = shards.remote(len)
    with pytest.raises(PrimaryLost, match="no server answered"):
        remote.step(1, [parts(2.0), parts(3.0)])
    ((token, error),) = shards.troubles
    assert (token, str(error)) == (TOKEN, "it cannot be applied")
    shards.meshes["server 1"].hear(("worker", Lost(token=TOKEN)))
    assert len(shards.troubles) == 1, "it hears nothing any more"


def test_a_lost_peer_is_the_trouble_of_its_group_alone(shards: Shards) -> None:
    for token in (TOKEN - 1, TOKEN):
        shards.meshes["server 0"].hear(("worker", Lost(token=token)))
    assert shards.troubles == [(TOKEN, None)]
