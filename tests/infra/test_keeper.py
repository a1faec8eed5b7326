"""The keeper's own decisions; that it has a stack up again is in test_lifecycle.py."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from infra.local import keeper, stack, supervisor
from infra.settings import write_state


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNBROKEN_HOME", str(tmp_path))
    return tmp_path


def test_stack_that_was_brought_down_stays_down(home: Path) -> None:
    write_state(home, {"ports": {}})
    keeper.keep_up()
    assert supervisor.supervisor_process(home) is None


def test_it_tries_until_the_disk_has_room_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And no longer than until somebody brings the stack down."""
    usage = namedtuple("usage", "free")
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            write_state(home, {"ports": {}})

    write_state(home, {"ports": {}, stack.WANTED: True})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free=0))
    monkeypatch.setattr(keeper.time, "sleep", pause)
    keeper.keep_up()
    assert pauses == [keeper.RETRY_SECONDS] * 3
    assert caplog.text.count("only 0 MiB are free") == 3
