"""Snapshots: files that the safetensors library reads, the same bytes for the same state, in one buffer."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from training.checkpoints.snapshot import Snapshot
from training.checkpoints.state import tensors_sha256
from training.errors import UserError

STATE = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "counter": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 4),
    "double": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.float64),
}


def test_any_safetensors_library_reads_it() -> None:
    found = safetensors.torch.load(bytes(Snapshot().take(STATE)))
    assert tensors_sha256(found) == tensors_sha256(STATE)


def test_the_same_state_gives_the_same_bytes_whatever_its_layout_in_memory() -> None:
    turned = {name: STATE[name] for name in reversed(STATE)} | {"weight": torch.tensor([[0.0, 3], [1, 4], [2, 5]]).t()}
    assert Snapshot().take(turned) == Snapshot().take(STATE)


def test_the_buffer_is_used_again() -> None:
    snapshot = Snapshot()
    first = snapshot.take(STATE)
    assert snapshot.take({**STATE, "counter": torch.tensor(8)}) is first
    assert safetensors.torch.load(bytes(first))["counter"].item() == 8
    assert set(safetensors.torch.load(bytes(snapshot.take({"counter": torch.tensor(9)})))) == {"counter"}


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"model\.spin has dtype torch\.complex64"):
        Snapshot().take({"model.spin": torch.zeros(2, dtype=torch.complex64)})
