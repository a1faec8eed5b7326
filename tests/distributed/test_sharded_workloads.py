"""The workloads with sharded state, as a user trains them: the bits of one process, and the same run."""

from __future__ import annotations

import pytest

from tests.conftest import Stack
from tests.servers.test_workloads import train


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["digits", "stdlib"])
def test_shards_give_the_bits_of_one_process(stack: Stack, preset: str) -> None:
    expected = train(stack, preset, 1)
    for num_ranks in (2, 4):
        found = train(stack, preset, num_ranks, "parallel.shard=2")
        assert (found["run_key"], found["state_sha256"]) == (expected["run_key"], expected["state_sha256"])
