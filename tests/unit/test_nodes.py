"""What is shown of a job's nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from infra.launcher import JobState, JobStatus, Launcher
from tasks.nodes import Nodes, describe

MAX_BYTES = 1000
WAITING = JobStatus(state=JobState.RUNNING, nodes={"node0": "RUNNING (n1)", "node1": "PENDING (Resources)"})


class Folder:
    """An engine, as far as its logs go."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def logs(self, key: str) -> Sequence[Path]:
        return sorted(self.path.glob("*.log"))


def test_each_line_is_shown_once_and_states_when_they_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "node0.log").write_text("from before\n")
    nodes = Nodes(cast("Launcher", Folder(tmp_path)), "key")
    nodes.show(WAITING)
    assert caplog.messages == ["nodes: 1 PENDING (Resources), 1 RUNNING"]

    caplog.clear()
    with (tmp_path / "node0.log").open("a") as file:
        file.write("one\nhalf of")
    (tmp_path / "node1.log").write_bytes(b"\xff\n")
    nodes.show(WAITING)
    assert caplog.messages == ["node0: one", "node1: �"]

    caplog.clear()
    with (tmp_path / "node0.log").open("a") as file:
        file.write(" two\n")
    nodes.show(WAITING)
    assert caplog.messages == ["node0: half of two"]


def test_a_flood_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.nodes.MAX_BYTES_AT_ONCE", MAX_BYTES)
    caplog.set_level(logging.INFO)
    nodes = Nodes(cast("Launcher", Folder(tmp_path)), "key")
    (tmp_path / "node0.log").write_text("x\n" * MAX_BYTES)
    nodes.show(None)
    assert len(caplog.messages) == 1 + MAX_BYTES // 2


def test_what_is_not_known_is_said() -> None:
    assert describe(None) == "none"
    assert describe(JobStatus(state=JobState.UNKNOWN, nodes={})) == "unknown"
