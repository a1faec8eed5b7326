"""The Slurm launcher beside commands that answer from a file: who cancels a job, and how often the queue is asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from infra.launcher import JobState
from infra.slurm.claims import Claim, change_claim
from infra.slurm.launcher import SlurmLauncher
from infra.slurm.site import Site
from infra.slurm.tasks import job_name
from tests.unit.fake_s3 import FakeS3
from training.errors import InfrastructureError
from training.s3.objectstore import Store

KEY = "key"
COMMANDS = {"squeue": "echo >> asked; cat queue", "scancel": ": > queue"}


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[SlurmLauncher]:
    """Of a run whose array 7 is at work, which two own."""
    for name, does in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\ncd {tmp_path}; {does}\n")
        (tmp_path / name).chmod(0o700)
    with FakeS3() as server:
        store = Store(server.location)
        launcher = SlurmLauncher(tmp_path, store, Site(commands=str(tmp_path)), max_age_seconds=math.inf)
        store.create_versioned(f"engine/slurm/{KEY}.json", asdict(Claim(job_id="7", owners=("one", "two"))))
        begin(launcher, tmp_path, job_id="7")
        yield launcher


def begin(launcher: SlurmLauncher, folder: Path, *, job_id: str) -> None:
    (folder / "queue").write_text(f"{job_id}|0|{job_name(launcher._mark, KEY)}|RUNNING|None|n1\n")


def num_asked(folder: Path) -> int:
    return len((folder / "asked").read_text())


def state(launcher: SlurmLauncher) -> JobState | None:
    status = launcher.find(KEY)
    return status.state if status else None


def test_an_array_is_cancelled_by_its_last_owner_or_for_all(launcher: SlurmLauncher, tmp_path: Path) -> None:
    assert not launcher.cancel(KEY, by={"one"})
    assert launcher.jobs() == {KEY: ("one", "two")}, "whether the other lives, others know"
    assert launcher.cancel(KEY)
    assert (state(launcher), (tmp_path / "queue").read_text()) == (None, "")
    change_claim(launcher._store, KEY, lambda _: Claim(job_id="8", owners=("one",)))
    begin(launcher, tmp_path, job_id="8")
    assert launcher.cancel(KEY, by={"one"})
    assert (state(launcher), (tmp_path / "queue").read_text()) == (None, "")


def test_while_the_store_is_away_an_owner_ends_nothing_and_a_person_ends_all(
    launcher: SlurmLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Store, key: str) -> None:
        raise InfrastructureError("the store is away")

    monkeypatch.setattr(Store, "read_versioned", away)
    with pytest.raises(InfrastructureError, match="the store is away"):
        launcher.cancel(KEY, by={"one"})
    assert (tmp_path / "queue").read_text()
    with pytest.raises(InfrastructureError, match="the store is away"):
        launcher.cancel(KEY)
    assert not (tmp_path / "queue").read_text()


def test_what_is_asked_all_the_time_asks_slurm_now_and_then(launcher: SlurmLauncher, tmp_path: Path) -> None:
    for _ in range(5):
        assert state(launcher) is JobState.RUNNING
        assert launcher.jobs() == {KEY: ("one", "two")}
    assert num_asked(tmp_path) == 1
    begin(launcher, tmp_path, job_id="8")
    change_claim(launcher._store, KEY, lambda claim: Claim(job_id="8", owners=claim.owners))
    assert state(launcher) is JobState.RUNNING, "somebody else submitted it since"
    assert launcher.cancel(KEY)
    assert (state(launcher), launcher.jobs()) == (None, {}), "what was cancelled is never shown"
    (tmp_path / "queue").write_text("")
    change_claim(launcher._store, KEY, lambda claim: Claim(job_id="8"))
    assert state(launcher) is JobState.ENDED
