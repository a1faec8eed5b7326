"""A rank killed every ten seconds for five minutes: what it costs, and that nothing is done twice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults.evidence import write_evidence
from tests.faults.namespaces import require_namespaces

SECONDS = 300
EVERY_SECONDS = 10


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_kills_every_ten_seconds() -> None:
    require_namespaces()
    times = ["--seconds", str(SECONDS), "--every", str(EVERY_SECONDS)]
    command = [sys.executable, "-m", "benchmarks.recovery.kills", *times]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=1000).stdout)
    write_evidence("goodput", rows=[found])
    assert found["num_kills"] == SECONDS / EVERY_SECONDS
    assert found["num_redone"] == 0
    assert found["goodput"] > 0.9
