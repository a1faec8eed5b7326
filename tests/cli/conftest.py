"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cli.commands import launched
from tests.conftest import Stack


@pytest.fixture(scope="module")
def nothing_launched(stack: Stack) -> Iterator[None]:
    """After a module's tests there is no flow run, job or run that was not there before them."""
    before = launched(stack)
    yield
    after = launched(stack)
    assert after.num_flow_runs <= before.num_flow_runs
    assert after.jobs <= before.jobs, "what the tests before left may end meanwhile"
    assert after.runs <= before.runs
