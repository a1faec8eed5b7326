"""What arrives is what was sent, in the tensors that it belongs in; and what is damaged on its way is refused."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.errors import InfrastructureError
from training.memory import transfer
from training.memory.live import Live, live
from training.memory.slots import file_of
from training.runs.events import Entry
from training.tensorfile import Layout

DTYPES = (torch.float32, torch.float16, torch.float64)
ENTRIES = [Entry(time=float(step), step=step, values={"loss": 0.5}) for step in (2, 3)]


@dataclass
class Wire:
    """Between two ranks of which one speaks first. Messages arrive when they are waited for, and no sooner."""

    messages: deque[bytes] = field(default_factory=deque)
    num_received: int = 0

    def isend(self, data: Tensor, taker: int) -> Any:
        self.messages.append(data.numpy().tobytes())
        return Work(lambda: None)

    def irecv(self, place: Tensor, giver: int) -> Any:
        message = self.messages.popleft()
        assert len(message) == len(place), "as gloo demands"
        self.num_received += 1
        return Work(lambda: place.copy_(torch.frombuffer(bytearray(message), dtype=torch.uint8)))

    def damage(self, number: int) -> None:
        message = bytearray(self.messages[number])
        message[len(message) // 2 if number else 0] ^= 1
        self.messages[number] = bytes(message)


@dataclass
class Work:
    wait: Any


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return connected(monkeypatch)


def connected(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire = Wire()
    monkeypatch.setattr(transfer.dist, "isend", wire.isend)
    monkeypatch.setattr(transfer.dist, "irecv", wire.irecv)
    return wire


def held(tensors: dict[str, Tensor]) -> Live:
    return live(run_key="k", generation=2, step=3, tensors=tensors, entries=ENTRIES)


def new_places(layout: Layout) -> dict[str, Tensor]:
    return {name: torch.empty(place.shape, dtype=place.dtype) for name, place in layout.items()}


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    chunk_bytes=st.integers(1, 50),
    num_under_way=st.integers(1, 5),
)
def test_any_state_arrives_whole(lengths: list[int], chunk_bytes: int, num_under_way: int) -> None:
    tensors = {f"model.{n}": torch.rand(length, dtype=DTYPES[n % 3]) for n, length in enumerate(lengths)}
    tensors["model.count"] = torch.tensor(7)  # before all that is named before it, as its elements are longer
    with pytest.MonkeyPatch.context() as monkeypatch:
        wire = connected(monkeypatch)
        monkeypatch.setattr(transfer, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(transfer, "NUM_UNDER_WAY", num_under_way)
        given_one = held(tensors)
        transfer.give(given_one, 1)
        taken, places = transfer.take(0, new_places)
    assert not wire.messages
    assert (taken.header, list(taken.entries)) == (given_one.header, ENTRIES)
    assert file_of(taken) == file_of(given_one)
    assert places.keys() == tensors.keys()
    assert all(torch.equal(places[name], tensor) for name, tensor in tensors.items())


def test_what_was_taken_can_be_given(wire: Wire) -> None:
    transfer.give(held({"model.weight": torch.arange(6.0).reshape(2, 3)}), 1)
    taken, _ = transfer.take(0, new_places)
    transfer.give(taken, 2)
    again, places = transfer.take(1, new_places)
    assert again.header == taken.header
    assert places["model.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_it_lies_in_the_places_that_were_named(wire: Wire) -> None:
    place = torch.zeros(3)
    transfer.give(held({"model.weight": torch.arange(3.0)}), 1)
    transfer.take(0, lambda layout: {"model.weight": place})
    assert place.tolist() == [0, 1, 2]


@pytest.mark.parametrize("number", range(5), ids=["announcement", "names", "tensor", "across", "journal"])
def test_what_does_not_arrive_whole_is_refused(wire: Wire, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 64)
    transfer.give(held({"model.weight": torch.rand(20)}), 1)
    wire.damage(number)
    with pytest.raises(InfrastructureError, match="did not arrive whole"):
        transfer.take(0, new_places)
