"""The workloads with a part of the state on each rank, as a user trains them: the bits of one process, and the same
run."""

from __future__ import annotations

import pytest

from tests.conftest import Stack
from tests.servers.test_workloads import train


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "parallel"), [("digits", "shard=2"), ("stdlib", "shard=2"), ("stdlib", "pipeline=2")]
)
def test_parts_give_the_bits_of_one_process(stack: Stack, preset: str, parallel: str) -> None:
    expected = train(stack, preset, 1)
    for num_ranks in (2, 4):
        found = train(stack, preset, num_ranks, f"parallel.{parallel}")
        assert (found["run_key"], found["state_sha256"]) == (expected["run_key"], expected["state_sha256"])


@pytest.mark.slow
def test_parts_of_matrices_give_their_own_bits_with_any_number_of_replicas_and_stages(stack: Stack) -> None:
    """It is another run than one process's."""
    pair, replicas = (train(stack, "stdlib", num_ranks, "parallel.tensor=2") for num_ranks in (2, 4))
    stages = train(stack, "stdlib", 4, "parallel.tensor=2", "parallel.pipeline=2")
    whole = train(stack, "stdlib", 1)
    for other in (replicas, stages):
        assert (pair["run_key"], pair["state_sha256"]) == (other["run_key"], other["state_sha256"])
    assert pair["run_key"] != whole["run_key"]
    assert pair["state_sha256"] != whole["state_sha256"]
