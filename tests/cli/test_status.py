"""`unbroken status RUN` and the status page: of a run whose rank was killed, on a terminal and in a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from infra.local.stack import monitor_url
from infra.local.supervisor import supervisor_process
from tests.cli.commands import complaint, unbroken
from tests.conftest import UNBROKEN, Stack
from tests.faults.injectors import KillProcess, Stop
from tests.flows.runs import at_leisure_while, last_json, processes, run_keys, wait_for_step
from tests.infra.probes import service_pid
from tests.waiting import wait_until
from training.runs.history import events_of
from training.runs.record import RunRecord

TAKE = Path(__file__).parents[2] / "docs" / "images" / "take.py"
OPTIONS = ("--set", "seed=404", "--set", "train.checkpoint_every_steps=10")
COLUMNS = 60
needs_browser = pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")


@pytest.fixture(scope="module")
def disturbed(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRecord]:
    """A run at work, one of whose ranks was killed, and which went on."""
    before, slow = run_keys(stack), tmp_path_factory.mktemp("disturbed") / "slow"
    command = stack.start("train", "digits", "--set", "train.steps=100000", *OPTIONS, *at_leisure_while(slow))
    try:
        run = wait_for_step(stack, before, step=20)
        fault = KillProcess(processes(stack, "training.cluster.worker")[0])
        fault.fire()
        assert fault.fired
        wait_until(lambda: len(run.read().attempt_starts) > 1, what="another attempt")
        _training(stack, run)
        slow.touch()
        yield run
    finally:
        command.send_signal(signal.SIGINT)
        command.communicate(timeout=240)
        for key in run_keys(stack) - before:
            stack.command("runs", "cancel", key)


def _training(stack: Stack, run: RunRecord) -> dict[str, Any]:
    """What is said of it, once it is seen to train: a node that answers late is told of as one that does not."""

    def look() -> dict[str, Any] | None:
        found = _json(stack, run)
        trains = found["state"] == "training" and [len(node["ranks"]) for node in found["nodes"]] == [1, 1]
        # the record tells of an attempt before its first event is followed, which says where its weights came from
        is_told = len(found["attempts"]) > 1 and found["attempts"][1]["source"]
        return found if trains and found["expected_end_at"] and is_told else None

    return wait_until(look, what="it to be seen training again")


def _json(stack: Stack, run: RunRecord) -> dict[str, Any]:
    done = unbroken(stack, "status", run.run_key, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_json_says_what_broke_and_who_trains(stack: Stack, disturbed: RunRecord) -> None:
    found = _training(stack, disturbed)
    assert (found["key"], found["model"], found["goal_steps"]) == (disturbed.run_key, "digits", 100_000)
    assert found["step"] >= 20
    assert found["expected_end_at"] > found["at"]
    assert found["num_departures"] >= 1
    assert "signal 9" in found["attempts"][0]["why_it_ended"]
    began = [event for event in events_of(disturbed, disturbed.read()) if event.kind == "attempt"]
    assert found["attempts"][1]["source"] == began[1].values["source"] != "start"
    with urllib.request.urlopen(f"{monitor_url()}/runs/{disturbed.run_key[:12]}.json", timeout=120) as reply:
        assert json.loads(reply.read())["key"] == disturbed.run_key, "the beginning of a key is enough"
    assert [node["is_answering"] for node in found["nodes"]] == [True, True]
    assert [rank["rank"] for node in found["nodes"] for rank in node["ranks"]] == [0, 1]
    assert found["seconds"]["productive"] > 0
    assert set(found["links"]) == {"MLflow", "S3"}


def test_sixty_columns_are_enough(stack: Stack, disturbed: RunRecord) -> None:
    one = _narrow(stack, disturbed.run_key[:12], until="TRAINING")
    for words in ("samples/s", "checkpoint", "node 1", "attempt 1", "signal 9", "s3://"):
        assert words in " ".join(one.split()), "though lines are wrapped"
    everything = _narrow(stack, until=disturbed.run_key[:12])
    for text in (one, everything):
        assert max(map(len, text.splitlines())) <= COLUMNS
        assert "\x1b" not in text, "only a terminal is painted"


def _narrow(stack: Stack, *which: str, until: str) -> str:
    """What is shown, once that is in it: the monitor may have been killed, and have looked at nothing yet."""

    def look() -> str:
        done = unbroken(stack, "status", *which, variables={"COLUMNS": str(COLUMNS)})
        assert done.returncode == 0, done.stderr
        return done.stdout if until in done.stdout else ""

    return wait_until(look, what=f"{until} to be shown")


@pytest.mark.slow
def test_a_terminal_is_shown_it_anew_though_the_monitor_dies(stack: Stack, disturbed: RunRecord) -> None:
    ours, theirs = pty.openpty()
    command = [UNBROKEN, "status", disturbed.run_key[:12]]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**stack.environment(), "COLUMNS": "60"})
    os.close(theirs)
    _read_until(ours, b"TRAINING")
    _read_until(ours, b"TRAINING")
    fault = KillProcess(psutil.Process(service_pid(stack.home, "monitor")))
    supervisor = supervisor_process(stack.home)
    assert supervisor is not None
    with Stop([supervisor]):  # it starts another between two looks
        fault.fire()
        assert fault.fired
        assert b"\x1b[J" in _read_until(ours, b"the monitor does not answer"), "it replaces what was there"
    _read_until(ours, b"\x1b[J\x1b[32mdigits")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    os.close(ours)


def _read_until(terminal: int, words: bytes) -> bytes:
    """What is shown, up to a screen with these words."""
    shown = b""

    def is_shown() -> bool:
        nonlocal shown
        while words not in shown and select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 1 << 16)
        return words in shown

    wait_until(is_shown, what=f"{words!r} on the terminal")
    return shown


@pytest.fixture(scope="module")
def take() -> ModuleType:
    """docs/images/take.py, which knows how a browser is driven."""
    spec = importlib.util.spec_from_file_location("take", TAKE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_browser
@pytest.mark.parametrize("width", [1120, 390])
def test_a_browser_shows_it_on_any_screen(stack: Stack, disturbed: RunRecord, take: ModuleType, width: int) -> None:
    with take.browser() as devtools:
        for path, words in ((f"/runs/{disturbed.run_key}", "attempt 2"), ("/", disturbed.run_key[:12])):
            is_there = f"document.readyState === 'complete' && document.body.innerText.includes('{words}')"
            is_styled = "getComputedStyle(document.querySelector('.card')).borderRadius === '12px'"
            shot = take.Shot(
                url=f"{monitor_url()}{path}", ready=f"{is_there} && {is_styled}", width=width, height=900, moves=True
            )
            picture, content_width = take.photograph(devtools, shot)
            assert picture.size == (width, 900)
            assert content_width <= width, "nothing sticks out"


def test_the_page_of_a_run_that_is_unknown(stack: Stack) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{monitor_url()}/runs/{'e' * 64}", timeout=120)
    assert refused.value.code == 404
    assert "There is nothing to show" in refused.value.read().decode()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{monitor_url()}/runs/eeee", timeout=120)
    assert "no run with a key that begins with" in refused.value.read().decode()


@pytest.mark.slow
def test_a_finished_run_is_at_its_last_step(stack: Stack) -> None:
    done = stack.command("train", "digits", "--json", "--ranks", "1", "--set", "train.steps=33", *OPTIONS)
    assert done.returncode == 0, done.stderr
    run = RunRecord(stack.store, last_json(done.stdout)["run_key"])
    wait_until(lambda: _json(stack, run)["state"] == "finished", what="its end to be seen")
    found = _json(stack, run)
    assert (found["step"], found["expected_end_at"], found["nodes"]) == (33, None, [])


@pytest.mark.parametrize(("key", "found"), [("ffffffff", "no run with a key that begins with 'ffffffff'")])
def test_a_run_that_there_is_not(stack: Stack, key: str, found: str) -> None:
    assert found in complaint(unbroken(stack, "status", key))
