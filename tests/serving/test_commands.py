"""What `unbroken serve` cannot serve is said in one line, at once."""

from __future__ import annotations

import socket
import subprocess

import pytest

from tests.cli.commands import complaint
from tests.conftest import UNBROKEN, Stack
from tests.serving.models import keep, promote
from tests.serving.servers import corner
from training.s3.objectstore import Store


def _serve(stack: Stack, store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNBROKEN, "serve", *arguments],
        env=corner(stack, store),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_what_cannot_be_served(stack: Stack, store: Store) -> None:
    keep(store, "quiet", "1", b"")
    store.create_versioned(
        "models/old/champion.json", {"format": 1, "model": "old", "version_of_registry": "4", "run_key": "r"}
    )
    for model, told in (
        ("adder", "give NAME@champion, or NAME/VERSION"),
        ("adder@challenger", "give NAME@champion, or NAME/VERSION"),
        ("adder@champion", "no model 'adder' at s3://"),
        ("adder/1", "there is old, quiet"),
        ("quiet@champion", "model 'quiet' has no champion"),
        ("quiet/2", "model 'quiet' version 2 has no model file on the store"),
        ("old@champion", "model 'old' version 4 has no model file on the store"),
    ):
        assert told in complaint(_serve(stack, store, model))


def test_a_first_version_that_is_no_program(stack: Stack, store: Store) -> None:
    promote(store, keep(store, "adder", "1", b"nothing"))
    line = complaint(_serve(stack, store, "adder@champion", "--replicas", "1"), code=6)
    assert "the model file of version 1 cannot be run by torch" in line


@pytest.mark.parametrize(
    ("arguments", "told"), [(["--replicas", "0"], "--replicas 0"), (["--port", "70000"], "--port 70000")]
)
def test_wrong_options(stack: Stack, store: Store, arguments: list[str], told: str) -> None:
    assert told in complaint(_serve(stack, store, "adder@champion", *arguments))


def test_a_port_that_is_taken(stack: Stack, store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        line = complaint(_serve(stack, store, "adder@champion", "--port", port), code=3)
    assert f"cannot listen on 127.0.0.1 port {port}" in line
