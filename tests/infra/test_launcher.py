"""The local engine keeps its word: one job per key, restarted when it dies, gone without a trace when cancelled."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import psutil
import pytest

from infra.launcher import CANCELLED, JobState, cancel_owned_by
from infra.local.launcher import LocalLauncher
from tests.conftest import Stack
from tests.faults.injectors import Stop
from tests.infra.conftest import ToyJob
from tests.infra.probes import is_alive, kill_9, service_pid
from tests.waiting import wait_until
from training.errors import FencedError, InfrastructureError, UserError

MakeJob = Callable[..., ToyJob]
NUM_AT_ONCE = 4


def test_each_node_runs_once_and_knows_its_number(toy_job: MakeJob) -> None:
    job = toy_job("(folder / f'told-{node}').write_text(os.environ['TOLD'])\nsignal.pause()", num_nodes=2)
    assert job.state() is None
    job.submit(owner="me")
    for node in (0, 1):
        assert job.wait_for_starts(1, node) == [job.pid(node)]
        told = wait_until(lambda path=job.folder / f"told-{node}": _text(path), what="the node's environment")  # type: ignore[misc]
        assert told == job.spec.environment["TOLD"]
    status = job.launcher.find(job.spec.key)
    assert status is not None
    assert (status.state, set(status.nodes)) == (JobState.RUNNING, {"node0", "node1"})
    assert job.launcher.jobs()[job.spec.key] == ["me"]
    logs = job.launcher.logs(job.spec.key)
    wait_until(lambda: all(path.stat().st_size for path in logs), what="the logs")
    assert [path.read_text() for path in logs] == ["node 0 says hello\n", "node 1 says hello\n"]


def test_submitting_again_is_the_same_job_with_one_more_owner(toy_job: MakeJob) -> None:
    job = toy_job()
    job.submit(owner="first")
    (pid,) = job.wait_for_starts(1)
    job.submit(owner="second")
    job.submit(owner="second")
    assert job.pid() == pid
    assert job.starts() == [pid]
    assert job.launcher.jobs()[job.spec.key] == ["first", "second"]


def test_environment_may_hold_any_sign(toy_job: MakeJob) -> None:
    """Supervisord's own form could not hold this value."""
    job = toy_job("(folder / 'told').write_text(os.environ['TOLD'])\nsignal.pause()")
    told = "\"'; # %(x)s"
    job.spec = replace(job.spec, environment={"TOLD": told})
    job.submit()
    wait_until((job.folder / "told").exists, what="the node's environment")
    assert wait_until(lambda: _text(job.folder / "told"), what="its text") == told


def test_killed_node_is_restarted_and_the_others_are_left_alone(toy_job: MakeJob) -> None:
    job = toy_job(num_nodes=2)
    job.submit()
    (victim,), (other,) = job.wait_for_starts(1, 0), job.wait_for_starts(1, 1)
    kill_9(victim)
    assert len(job.wait_for_starts(2, 0)) == 2
    assert job.starts(1) == [other] == [job.pid(1)]


def test_only_the_three_final_exit_codes_are_final(toy_job: MakeJob) -> None:
    """0 is done, 2 is wrong input, 4 would fail again; 1, 3 and 5 are tried again."""
    final = [toy_job(f"sys.exit({code})") for code in (0, 2, 4)]
    for job in final:
        job.submit()
    for job in final:
        wait_until(lambda job=job: job.state() is JobState.ENDED, what="the job's end")  # type: ignore[misc]
    again = [toy_job(f"num_starts < 3 and sys.exit({code})\nsignal.pause()") for code in (1, 3, 5)]
    for job in again:
        job.submit()
    for job in again:
        assert len(job.wait_for_starts(3)) == 3, "the engine had its chances to restart the others too"
    assert [len(job.starts()) for job in final] == [1, 1, 1]


def test_job_between_two_starts_has_not_ended(toy_job: MakeJob) -> None:
    """Or whoever follows it would call a run lost that is about to go on."""
    job = toy_job("(folder / 'enough').exists() or sys.exit(3)\nsignal.pause()")
    job.submit()
    num_before, seen = len(job.starts()), {job.state()}
    while len(job.starts()) < num_before + 10:
        seen.add(job.state())
    (job.folder / "enough").touch()
    assert seen == {JobState.RUNNING}


def test_ended_job_runs_again_when_it_is_submitted_again(toy_job: MakeJob) -> None:
    job = toy_job("sys.exit(0)")
    job.submit()
    wait_until(lambda: job.state() is JobState.ENDED, what="the job's end")
    job.submit()
    assert len(job.wait_for_starts(2)) == 2


def test_gang_is_over_once_one_node_is_done_and_all_its_nodes_start_again(toy_job: MakeJob) -> None:
    """Or whoever follows it would wait for ever, as the nodes that are left do."""
    job = toy_job("node == '0' and num_starts == 1 and sys.exit(0)\nsignal.pause()", num_nodes=2)
    job.submit()
    (left,) = job.wait_for_starts(1, 1)
    wait_until(lambda: job.state() is JobState.ENDED, what="the job's end")
    job.submit()
    assert len(job.wait_for_starts(2, 0)) == len(job.wait_for_starts(2, 1)) == 2
    assert not is_alive(left)
    assert job.state() is JobState.RUNNING


def test_job_outlives_who_submitted_it(toy_job: MakeJob) -> None:
    job = toy_job()
    program = (
        "import os, pathlib, sys; from infra.launcher import JobSpec; from infra.local.launcher import LocalLauncher;"
        "LocalLauncher(pathlib.Path(sys.argv[1])).submit(JobSpec(key=sys.argv[2], num_nodes=1,"
        " command=tuple(sys.argv[3:]), environment={}));"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(job.home), job.spec.key, *job.spec.command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (pid,) = job.wait_for_starts(1)
    assert is_alive(pid)
    assert job.state() is JobState.RUNNING


CHILD = {
    "plain": "signal.pause()",
    "deaf to SIGTERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready()\nsignal.pause()",
    "in a session of its own": "os.setsid()\nready()\nsignal.pause()",
}


@pytest.mark.parametrize("child", CHILD)
def test_cancel_leaves_no_process(toy_job: MakeJob, child: str) -> None:
    """Neither the node nor its child, whatever the child does."""
    job = toy_job(
        f"""
        def ready():
            (folder / "ready").touch()

        child = os.fork()
        if child == 0:
            for line in {CHILD[child].splitlines()!r}:
                exec(line)
        (folder / "child").write_text(str(child))
        signal.pause()
        """
    )
    job.submit(owner="me")
    (node,) = job.wait_for_starts(1)
    child_pid = int(wait_until(lambda: _text(job.folder / "child"), what="the child"))
    if child != "plain":
        wait_until((job.folder / "ready").exists, what="the child to be ready")
    assert is_alive(child_pid)
    try:
        job.launcher.cancel(job.spec.key)
        assert not is_alive(node)
        assert not is_alive(child_pid)
        assert job.state() is None
        assert job.spec.key not in job.launcher.jobs()
    finally:
        if is_alive(child_pid):
            psutil.Process(child_pid).kill()


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_cancelled_job_can_be_cancelled_again_and_submitted_again(toy_job: MakeJob) -> None:
    job = toy_job()
    job.launcher.cancel(job.spec.key)
    job.submit(owner="me")
    job.wait_for_starts(1)
    job.launcher.cancel(job.spec.key)
    job.launcher.cancel(job.spec.key)
    job.submit()
    job.wait_for_starts(2)
    assert job.launcher.jobs()[job.spec.key] == []


@pytest.fixture
def no_reaper(stack: Stack) -> Iterator[None]:
    """The stack's own would end what is half cancelled, any moment."""
    with Stop([psutil.Process(service_pid(stack.home, "reaper"))]) as stop:
        assert stop.fired
        yield


def half_cancelled(toy_job: MakeJob) -> tuple[ToyJob, int]:
    """A job that whoever cancelled it left at work, and its node's process."""
    job = toy_job()
    job.submit(owner="before")
    (pid,) = job.wait_for_starts(1)
    program = (
        "import os, pathlib, sys; from infra.local.launcher import LocalLauncher;"
        "LocalLauncher._stop_and_remove = lambda *_: os.kill(os.getpid(), 9);"
        "LocalLauncher(pathlib.Path(sys.argv[1])).cancel(sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(job.home), job.spec.key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert is_alive(pid)
    return job, pid


@pytest.mark.usefixtures("no_reaper")
def test_job_whose_canceller_was_killed_is_seen_and_can_be_ended(toy_job: MakeJob) -> None:
    job, pid = half_cancelled(toy_job)
    assert job.state() is None
    assert job.launcher.jobs()[job.spec.key] == ["before", CANCELLED]
    job.launcher.reap(job.spec.key)
    assert not is_alive(pid)
    assert job.spec.key not in job.launcher.jobs()


@pytest.mark.usefixtures("no_reaper")
def test_half_cancelled_job_that_is_submitted_again_is_a_new_one(toy_job: MakeJob) -> None:
    job, pid = half_cancelled(toy_job)
    job.submit(owner="after")
    (new,) = job.wait_for_starts(2)[1:]
    job.launcher.reap(job.spec.key)
    assert (is_alive(pid), is_alive(new)) == (False, True)
    assert job.launcher.jobs()[job.spec.key] == ["after"]


def test_cancelled_job_is_never_seen_as_ended(toy_job: MakeJob) -> None:
    """Or whoever follows it would take it for lost, and submit it again."""
    job = toy_job(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'deaf').touch()\nsignal.pause()", num_nodes=2
    )
    job.submit()
    wait_until((job.folder / "deaf").exists, what="the node to be deaf")
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(job.launcher.cancel, job.spec.key)
        seen = set()
        while not cancelled.done():
            seen.add(job.state())
    assert seen <= {JobState.RUNNING, None}
    assert job.state() is None


def test_what_is_left_of_a_gang_is_reaped_and_stays_ended(toy_job: MakeJob) -> None:
    job = toy_job("node == '0' and num_starts == 1 and sys.exit(0)\nsignal.pause()", num_nodes=2)
    job.submit()
    (left,) = job.wait_for_starts(1, 1)
    wait_until(lambda: job.state() is JobState.ENDED, what="the job's end")
    job.launcher.reap(job.spec.key)
    assert not is_alive(left)
    assert job.state() is JobState.ENDED
    job.submit()
    job.wait_for_starts(2, 0)
    (pid,) = job.wait_for_starts(2, 1)[1:]
    job.launcher.reap(job.spec.key)
    assert is_alive(pid), "a job that runs is left alone"


def test_newer_generation_takes_the_place_of_an_older_one_and_not_the_other_way_round(toy_job: MakeJob) -> None:
    job = toy_job()
    job.submit()
    (old,) = job.wait_for_starts(1)
    older = job.spec
    job.spec = replace(job.spec, generation=1)
    job.submit()
    (new,) = job.wait_for_starts(2)[1:]
    assert (is_alive(old), is_alive(new)) == (False, True)
    with pytest.raises(FencedError, match="begun anew"):
        job.launcher.submit(older)
    assert is_alive(new)


def test_job_of_another_store_is_not_taken_for_ones_own(toy_job: MakeJob) -> None:
    job = toy_job()
    job.submit()
    (pid,) = job.wait_for_starts(1)
    with pytest.raises(UserError, match="is at work for"):
        job.launcher.submit(replace(job.spec, store="s3://elsewhere/"))
    assert is_alive(pid)


def test_job_whose_servers_moved_begins_again(toy_job: MakeJob) -> None:
    job = toy_job()
    job.submit()
    job.wait_for_starts(1)
    job.spec = replace(job.spec, environment={**job.spec.environment, "UNBROKEN_S3_ENDPOINT": "http://127.0.0.1:1"})
    job.submit()
    old, new = job.wait_for_starts(2)
    assert (is_alive(old), is_alive(new)) == (False, True)


def test_job_whose_program_moved_begins_again(toy_job: MakeJob) -> None:
    """As with another version of the project, which has that module in another place."""
    job = toy_job()
    job.submit()
    job.wait_for_starts(1)
    python, program, *arguments = job.spec.command
    moved = Path(program).rename(job.folder / "moved.py")
    job.spec = replace(job.spec, command=(python, str(moved), *arguments))
    job.submit()
    old, new = job.wait_for_starts(2)
    assert (is_alive(old), is_alive(new)) == (False, True)


def test_cancelling_an_owner_cancels_the_jobs_that_are_its_alone(toy_job: MakeJob) -> None:
    mine, shared, other = toy_job(), toy_job(), toy_job()
    mine.submit(owner="flow-1")
    shared.submit(owner="flow-2")
    shared.submit(owner="flow-1")
    other.submit(owner="flow-11")
    for job in (mine, shared, other):
        job.wait_for_starts(1)
    cancelled = cancel_owned_by(mine.launcher, "flow-1")
    assert cancelled == [mine.spec.key]
    assert [is_alive(job.starts()[0]) for job in (mine, shared, other)] == [False, True, True]
    assert not shared.launcher.cancel(shared.spec.key, by={"flow-1"})
    assert shared.launcher.jobs()[shared.spec.key] == ["flow-2", "flow-1"], "whether one of them lives, others know"
    assert shared.launcher.cancel(shared.spec.key)
    assert not is_alive(shared.starts()[0])


def test_one_key_submitted_at_once_is_one_job(toy_job: MakeJob) -> None:
    jobs = [toy_job() for _ in range(3)]
    for job in jobs:
        _at_once([lambda owner=f"owner-{n}", job=job: job.submit(owner=owner) for n in range(NUM_AT_ONCE)])  # type: ignore[misc]
    for job in jobs:
        job.wait_for_starts(1)
        assert job.state() is JobState.RUNNING
        assert job.starts() == [job.pid()]
        assert sorted(job.launcher.jobs()[job.spec.key]) == [f"owner-{n}" for n in range(NUM_AT_ONCE)]


def test_different_keys_submitted_at_once_all_run(toy_job: MakeJob) -> None:
    jobs = [toy_job() for _ in range(2 * NUM_AT_ONCE)]
    for start in range(0, len(jobs), NUM_AT_ONCE):
        _at_once([job.submit for job in jobs[start : start + NUM_AT_ONCE]])
    for job in jobs:
        job.wait_for_starts(1)
        assert job.state() is JobState.RUNNING


def test_ended_job_submitted_again_at_once_is_one_job(toy_job: MakeJob) -> None:
    job = toy_job("num_starts == 1 and sys.exit(0)\nsignal.pause()")
    job.submit()
    wait_until(lambda: job.state() is JobState.ENDED, what="the job's end")
    _at_once([job.submit] * NUM_AT_ONCE)
    assert job.wait_for_starts(2)[1:] == [job.pid()]


def _at_once(calls: list[Callable[[], None]]) -> None:
    barrier = Barrier(len(calls))

    def call(function: Callable[[], None]) -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call, function) for function in calls]:
            future.result()


@pytest.mark.parametrize("ask", ["find", "submit", "cancel"])
def test_engine_that_does_not_run_is_an_error_that_says_how_to_start_it(
    stack: Stack, toy_job: MakeJob, tmp_path: Path, ask: str
) -> None:
    spec = toy_job().spec
    launcher = LocalLauncher(tmp_path / "nowhere")
    asked: dict[str, Callable[[], object]] = {
        "find": lambda: launcher.find(spec.key),
        "submit": lambda: launcher.submit(spec),
        "cancel": lambda: launcher.cancel(spec.key),
    }
    with pytest.raises(InfrastructureError, match="`unbroken up`"):
        asked[ask]()
