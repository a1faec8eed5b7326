"""A model with three versions, and a real server of it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conftest import Stack
from tests.faults.proxy import LosingProxy
from tests.serving.load import CONSTANTS, Corner
from tests.serving.models import keep, promote
from tests.serving.servers import Server
from training.s3.objectstore import Store, StoreLocation


@pytest.fixture(scope="module")
def corner(stack: Stack) -> Iterator[Corner]:
    from tests.serving.programs import program  # torch, which most tests here do without

    where = stack.location
    store = Store(
        StoreLocation(endpoint=where.endpoint, bucket=where.bucket, prefix=f"tests/serving-{os.urandom(4).hex()}/")
    )
    kept = {version: keep(store, "adder", version, program(constant)) for version, constant in CONSTANTS.items()}
    promote(store, kept["1"])
    assert where.endpoint is not None
    with (
        LosingProxy(where.endpoint) as proxy,
        Server(stack, store, "adder@champion", endpoint=proxy.endpoint) as server,
    ):
        yield Corner(store, kept, server, proxy)
