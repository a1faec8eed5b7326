"""One cluster for the tests of a file, whose nodes find the stack's store where this machine does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import Stack
from tests.slurm.cluster import SlurmCluster


@pytest.fixture(scope="module")
def cluster(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), store=stack.settings.s3_endpoint) as running:
        yield running
