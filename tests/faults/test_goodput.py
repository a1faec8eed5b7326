"""A rank killed every ten seconds for five minutes: what it costs, and that nothing is done twice."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.data.store import make_bucket, running_store
from benchmarks.recovery.kills import MEGABYTE, suffer
from benchmarks.recovery.systems import BUCKET
from tests.faults.evidence import write_evidence

SECONDS = 300.0
EVERY_SECONDS = 10.0
NUM_HOSTS = 3


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_kills_every_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")  # and all that the store sets, as it was before
    with running_store(tmp_path / "store"):
        make_bucket(BUCKET)
        found = suffer(
            100 * MEGABYTE, num_hosts=NUM_HOSTS, seconds=SECONDS, every_seconds=EVERY_SECONDS, seed=1, parent=tmp_path
        )
    write_evidence("goodput", rows=[asdict(found)])
    assert found.num_kills == SECONDS / EVERY_SECONDS
    assert found.num_redone == 0
    assert found.goodput > 0.9
