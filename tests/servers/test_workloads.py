"""The workloads with parameter servers, as a user trains them: the bits of exact mode, on any number of each."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.flows.runs import last_json

STEPS = 30


def train(stack: Stack, preset: str, num_ranks: int, *settings: str) -> dict[str, Any]:
    options = [option for setting in (*settings, "train.checkpoint_every_steps=10") for option in ("--set", setting)]
    command = ("train", preset, "--json", "--fresh", "--ranks", str(num_ranks), "--steps", str(STEPS), *options)
    done = stack.command(*command)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = last_json(done.stdout)
    return found


def row(stack: Stack, preset: str, num_ranks: int, num_servers: int, expected: dict[str, Any]) -> dict[str, Any]:
    found = train(stack, preset, num_ranks, "train.strategy=parameter_server", f"launch.servers={num_servers}")
    return {
        "preset": preset,
        "num_ranks": num_ranks,
        "num_servers": num_servers,
        "state_sha256": found["state_sha256"],
        "same_state": found["state_sha256"] == expected["state_sha256"],
        "same_run_key": found["run_key"] == expected["run_key"],
    }


@pytest.mark.slow
def test_servers_give_the_bits_of_exact_mode(stack: Stack) -> None:
    expected = train(stack, "digits", 1)
    found = row(stack, "digits", 2, 2, expected)
    assert found["same_state"]
    assert found["same_run_key"]


@pytest.mark.slow
def test_tables_on_servers_give_the_bits_of_whole_gradients(stack: Stack) -> None:
    expected = train(stack, "words", 1, "train.strategy=all_reduce")
    found = row(stack, "words", 2, 2, expected)
    assert found["same_state"]
    assert found["same_run_key"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_servers_give_the_bits_of_exact_mode_on_both_workloads(stack: Stack) -> None:
    rows = []
    for preset in ("digits", "stdlib"):
        expected = train(stack, preset, 1)
        rows += [row(stack, preset, ranks, servers, expected) for ranks in (1, 2, 4) for servers in (1, 2, 4)]
    assert all(one["same_state"] and one["same_run_key"] for one in rows)
    write_evidence("parameter-server", rows=rows)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_tables_on_servers_give_the_bits_of_whole_gradients_on_all_numbers_of_ranks(stack: Stack) -> None:
    expected = train(stack, "words", 1, "train.strategy=all_reduce")
    rows = [row(stack, "words", ranks, servers, expected) for ranks in (1, 2, 4) for servers in (1, 2, 4)]
    assert all(one["same_state"] and one["same_run_key"] for one in rows)
    write_evidence("embedding-tables", rows=rows)
