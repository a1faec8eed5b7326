"""One cluster for the tests of a file, whose nodes find the stack's store where this machine does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Stack
from tests.slurm.cluster import SlurmCluster
from tests.slurm.running import Run
from tests.waiting import wait_until
from training.s3.objectstore import Store

PATIENT = {"slurmd_timeout_seconds": 60, "grace_seconds": 60}
"""A busy machine is no dead node."""


@pytest.fixture(scope="module")
def cluster(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[SlurmCluster]:
    """A file of tests may name other `TIMES`."""
    times = getattr(request.module, "TIMES", PATIENT)
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), store=stack.settings.s3_endpoint, **times) as running:
        yield running


@pytest.fixture
def corner(stack: Stack) -> Store:
    """Another empty place on the stack's store."""
    return Store(replace(stack.location, prefix=f"tests/{os.urandom(4).hex()}/"))


@pytest.fixture
def run(cluster: SlurmCluster, store: Store, tmp_path: Path) -> Iterator[Run]:
    started = Run(cluster, store, tmp_path / "run")
    yield started
    started.launcher.cancel(started.key)


@pytest.fixture(scope="module")
def calm(cluster: SlurmCluster, stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to which nothing happens."""
    store = Store(replace(stack.location, prefix=f"tests/calm-{os.urandom(4).hex()}/"))
    started = Run(cluster, store, tmp_path_factory.mktemp("calm") / "run")
    started.agents.hurry()
    started.submit()
    wait_until(lambda: started.record().result, what="the calm run's result")
    wait_until(lambda: not started.tasks(), what="the job's end")
    return started
