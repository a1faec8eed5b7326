"""A whole life: a server that cannot come up, repair, death by `kill -9`, coming back with its data, the end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.launcher import JobSpec, JobState
from infra.local import stack as local
from infra.local import supervisor
from infra.local.launcher import LocalLauncher
from infra.settings import activate, credentials_path, load_settings, read_state
from tests.conftest import UNBROKEN
from tests.faults.injectors import Stop
from tests.infra.probes import environment_for, is_alive, kill_9, post_json, service_pid
from tests.waiting import wait_until
from training.errors import InfrastructureError
from training.s3.objectstore import Store, StoreLocation

JOB = "c0ffee" * 10


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a stack of this test's own; no process of it is left, however the test ends."""
    folder = tmp_path / "a home"
    environment = dict(os.environ)
    for name in set(environment) - set(environment_for(folder)):
        monkeypatch.delenv(name)
    monkeypatch.setenv("UNBROKEN_HOME", str(folder))
    yield folder
    supervisor.stop(folder)
    os.environ.clear()  # `up` and `activate` write into it
    os.environ.update(environment)


@pytest.mark.slow
def test_stack_dies_and_comes_back_with_its_data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails_naming_the_service_that_does_not_come_up(home, monkeypatch)
    _unbroken("up")
    ports = read_state(home)["ports"]
    _write_something(home)
    orphan = service_pid(home, f"{JOB}:node0")

    _supervisor_alone_is_killed(home)
    orphan = service_pid(home, f"{JOB}:node0")

    _kill_all_but(home, orphan)
    assert _unbroken("status", expect=3).stderr.strip().endswith("started by `unbroken up` (or `make up`)")
    assert is_alive(orphan), "its supervisor is dead, and it lives"

    told = _unbroken("up").stderr
    assert "killed 1 processes that had outlived their supervisor" in told
    assert not is_alive(orphan)
    assert read_state(home)["ports"] == ports
    _everything_is_still_there(home)

    processes = [*supervisor.stack_processes(home), *filter(None, [supervisor.supervisor_process(home)])]
    assert len(processes) >= 6
    assert _unbroken("down").stdout == "stopped\n"
    assert not [process for process in processes if process.is_running() and is_alive(process.pid)]
    assert not supervisor.stack_processes(home)
    assert "`unbroken up`" in _unbroken("status", expect=3).stderr
    assert _unbroken("down").stdout == "nothing was running\n"


def _fails_naming_the_service_that_does_not_come_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 is given garbage for its users; once that is gone, the same command brings everything up."""
    home.mkdir()
    garbage = [home / "s3-identities.json", credentials_path(home)]
    for path in garbage:
        path.write_text("{garbage")
    log = home / "logs" / "s3.log"

    def end_of_log() -> str:
        """As it is told; nothing, if S3 had not said a word yet."""
        with pytest.raises(InfrastructureError) as caught:
            local.up(lambda line: None)
        assert "service 's3' does not come up" in str(caught.value)
        message, _, end = str(caught.value).partition(" and ends with:\n  ")
        assert str(log) in message
        return end

    with monkeypatch.context() as patch:
        patch.setattr(local, "START_SECONDS", 3.0)
        told = wait_until(end_of_log, what="the end of a log")
    assert told.splitlines()[0] in log.read_text().splitlines()
    for path in garbage:
        path.unlink()


def _write_something(home: Path) -> None:
    settings = load_settings()
    activate(settings)
    _store().put("kept/object", b"before")
    post_json(f"{settings.mlflow_uri}/api/2.0/mlflow/experiments/create", {"name": "kept"})
    command = ("/bin/sleep", "86400")
    LocalLauncher(home).submit(JobSpec(key=JOB, num_nodes=1, command=command, environment={}, owner="kept"))
    wait_until(lambda: service_pid(home, f"{JOB}:node0"), what="the job to begin")


def _supervisor_alone_is_killed(home: Path) -> None:
    """Its keeper has everything up again, job and all, and nothing is left of before."""
    head = supervisor.supervisor_process(home)
    assert head is not None
    before = {head, *supervisor.stack_processes(home)}
    ports = read_state(home)["ports"]
    head.kill()
    wait_until(lambda: supervisor.supervisor_process(home) not in (None, head), what="another supervisor")
    wait_until(lambda: supervisor.is_running(home) and service_pid(home, f"{JOB}:node0"), what="the job to run again")
    _unbroken("up")  # waits until all is well
    wait_until(lambda: not [p for p in before if p.is_running()], what="all of before to be gone, the old keeper last")
    assert read_state(home)["ports"] == ports
    _everything_is_still_there(home)


def _kill_all_but(home: Path, survivor: int) -> None:
    """The supervisor is stopped first, or it would start again what dies; and it dies last, or its keeper would."""
    head = supervisor.supervisor_process(home)
    assert head is not None

    def others_are_dead() -> bool:
        others = [process for process in supervisor.stack_processes(home) if process.pid != survivor]
        for process in others:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not others

    with Stop([head]):
        wait_until(others_are_dead, what="all others to be dead")
        kill_9(head.pid)
    assert [process.pid for process in supervisor.stack_processes(home)] == [survivor]


def _everything_is_still_there(home: Path) -> None:
    assert _store().get("kept/object") == b"before"
    url = f"{load_settings().mlflow_uri}/api/2.0/mlflow/experiments/get-by-name?experiment_name=kept"
    with urllib.request.urlopen(url, timeout=120) as reply:
        assert json.load(reply)["experiment"]["lifecycle_stage"] == "active"
    launcher = LocalLauncher(home)
    status = launcher.find(JOB)
    assert status is not None
    assert status.state is JobState.RUNNING
    assert launcher.jobs() == {JOB: ["kept"]}


def _store() -> Store:
    settings = load_settings()
    return Store(StoreLocation(endpoint=settings.s3_endpoint, bucket=settings.s3_bucket))


def _unbroken(verb: str, *, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([UNBROKEN, verb], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done
