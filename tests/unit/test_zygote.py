"""The warm process that workers are forked from: what workers get, and who dies with whom."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.tiny import tiny_preset
from tests.waiting import wait_until
from training.cluster.zygote import Worker, Zygote
from training.config import Preset
from training.errors import InfrastructureError

WORK = "tests.unit.zygote_work:work"
LONG = 120.0
RECIPE = "from training.recipes.digits import Digits\nANSWER = {answer}\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Zygote]:
    """For tests that do it no harm."""
    with closing(Zygote(tiny_preset(), entry=WORK)) as zygote:
        yield zygote


@contextmanager
def zygote_for(preset: Preset) -> Iterator[Zygote]:
    with closing(Zygote(preset, entry=WORK)) as zygote:
        yield zygote


def preset_beside(folder: Path, source: str, name: str) -> Preset:
    """A preset whose recipe is a module of the folder."""
    (folder / f"{name}.py").write_text(source)
    return replace(tiny_preset(), recipe=f"{name}:Digits", folder=str(folder))


def start_saying(zygote: Zygote, **order: Any) -> tuple[Worker, dict[str, Any]]:
    """A worker, and what it said of itself."""
    read_fd, write_fd = os.pipe()
    worker = zygote.start(order, {"say_fd": write_fd})
    os.close(write_fd)
    with open(read_fd) as said:
        line = said.readline()
    return worker, json.loads(line)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def num_fds(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ({"code": 0}, 0),
        ({"code": 7}, 7),
        ({"raises": True}, 1),
        ({"exits": 5}, 5),
        ({"exits": "a reason"}, 1),
        ({"filler": "x" * 1_000_000, "code": 3}, 3),
    ],
)
def test_worker_does_what_is_ordered_and_its_exit_code_arrives(
    shared: Zygote, order: dict[str, Any], code: int
) -> None:
    worker = shared.start(order, {})
    assert worker.wait(LONG) == worker.poll() == code


def test_worker_has_torch_and_one_thread_and_none_of_the_zygotes_sockets(shared: Zygote) -> None:
    bystander, _ = start_saying(shared, sleeps=True)
    worker, seen = start_saying(shared)
    assert worker.wait(LONG) == 0
    assert (seen["pid"], seen["parent"]) == (worker.pid, shared.pid)
    assert (seen["torch_is_there"], seen["num_threads"]) == (True, 1)
    opened = [name for name in seen["fds"] if "socket" in name or "anon_inode" in name or "memfd" in name]
    assert opened == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait(LONG)


def test_every_worker_has_randomness_of_its_own(shared: Zygote) -> None:
    seen = []
    for _ in range(2):
        worker, said = start_saying(shared)
        worker.wait(LONG)
        seen.append(said["random"])
    assert all(one != other for one, other in zip(*seen, strict=True))


def test_descriptors_arrive_under_their_names(shared: Zygote) -> None:
    source, feed = os.pipe()
    result, target = os.pipe()
    os.write(feed, b"through two pipes")
    worker = shared.start({}, {"copy_fds": [source, target]})
    assert worker.wait(LONG) == 0
    assert os.read(result, 100) == b"through two pipes"
    for fd in (source, feed, result, target):
        os.close(fd)


def test_worker_is_listed_as_one(shared: Zygote) -> None:
    worker, _ = start_saying(shared, sleeps=True)
    assert "training.cluster.worker" in psutil.Process(worker.pid).cmdline()
    assert shared.pid is not None
    assert "training.cluster.worker" not in psutil.Process(shared.pid).cmdline()
    worker.kill()
    worker.wait(LONG)


def test_death_of_a_worker_is_seen_through_its_descriptor(shared: Zygote) -> None:
    worker, _ = start_saying(shared, sleeps=True)
    poll = select.poll()
    poll.register(worker, select.POLLIN)
    assert poll.poll(0) == []
    assert worker.poll() is None
    with pytest.raises(TimeoutError, match=str(worker.pid)):
        worker.wait(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    ((fd, event),) = poll.poll(LONG * 1000)
    assert fd == worker.fileno()
    assert event & select.POLLIN  # and a hang-up, once its zygote has reaped it
    assert worker.poll() == -signal.SIGKILL
    worker.kill()  # and hits nobody


def test_workers_die_with_their_zygote_and_the_next_start_has_a_new_one() -> None:
    with zygote_for(tiny_preset()) as zygote:
        workers = [start_saying(zygote, sleeps=True)[0] for _ in range(2)]
        first = zygote.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert [worker.wait(LONG) for worker in workers] == [-signal.SIGKILL] * 2
        assert zygote.start({"code": 4}, {}).wait(LONG) == 4
        assert zygote.pid != first


def test_everything_dies_with_the_agent() -> None:
    program = f"""
from tests.unit.tiny import tiny_preset
from training.cluster.zygote import Zygote
import time
zygote = Zygote(tiny_preset(), entry={WORK!r})
print(zygote.start({{"sleeps": True}}, {{}}).pid, zygote.pid, flush=True)
time.sleep(600)
"""
    agent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    pids = [int(pid) for pid in agent.stdout.readline().split()]
    assert len(pids) == 2
    agent.kill()
    agent.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids), what="zygote and worker to be gone")
    agent.stdout.close()


def test_signals_to_the_group_are_the_agents_to_act_on() -> None:
    program = f"""
from tests.unit.tiny import tiny_preset
from training.cluster.zygote import Zygote
import os, signal
zygote = Zygote(tiny_preset(), entry={WORK!r})
zygote.prepare()
for stop in (signal.SIGTERM, signal.SIGINT):
    signal.signal(stop, signal.SIG_IGN)
    os.killpg(0, stop)
    signal.signal(stop, signal.SIG_DFL)
    worker = zygote.start({{"sleeps": True}}, {{}})
    pid = zygote.pid
    signal.signal(stop, signal.SIG_IGN)
    os.killpg(0, stop)
    lives = worker.poll() is None
    worker.kill()
    print(lives, worker.wait(120), zygote.pid == pid, flush=True)
print(zygote.start({{"code": 6}}, {{}}).wait(120), zygote.pid == pid)
"""
    agent = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, start_new_session=True, check=True
    )
    assert agent.stdout.splitlines() == ["True -9 True", "True -9 True", "6 True"]


def test_many_workers_leave_nothing_behind(shared: Zygote) -> None:
    assert shared.start({}, {}).wait(LONG) == 0
    assert shared.pid is not None
    gc.collect()  # or what tests before left would be closed meanwhile
    before = (num_fds("self"), num_fds(shared.pid))
    for number in range(50):
        assert shared.start({"code": number}, {"handed_fd": sys.stderr.fileno()}).wait(LONG) == number
    assert psutil.Process(shared.pid).children() == []
    assert (num_fds("self"), num_fds(shared.pid)) == before


def test_closed_zygote_takes_its_workers_along() -> None:
    zygote = Zygote(tiny_preset(), entry=WORK)
    worker, _ = start_saying(zygote, sleeps=True)
    zygote.close()
    assert worker.wait(LONG) == -signal.SIGKILL
    assert zygote.pid is not None
    assert not psutil.pid_exists(zygote.pid)


def test_recipe_is_imported_before_the_fork(tmp_path: Path) -> None:
    with zygote_for(preset_beside(tmp_path, RECIPE.format(answer=1), "preloaded")) as zygote:
        zygote.prepare()
        wait_until(zygote.is_ready, what="the zygote to be ready")
        worker, seen = start_saying(zygote, recipe="preloaded")
        worker.wait(LONG)
        assert (seen["was_preloaded"], seen["answer"]) == (True, 1)


@pytest.mark.parametrize(
    "line",
    [
        "import os, sys; os.chdir('/'); sys.exit()",
        pytest.param("import os; os._exit(0)", marks=pytest.mark.slow),
        pytest.param(
            "import torch; torch.set_num_threads(2); (torch.ones(999, 999) @ torch.ones(999, 999)).sum()",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_recipe_that_spoils_the_zygote_is_left_to_the_workers(tmp_path: Path, line: str) -> None:
    with zygote_for(preset_beside(tmp_path, RECIPE.format(answer=1) + line, "spoiling")) as zygote:
        worker, seen = start_saying(zygote, recipe="spoiling", code=8)
        assert worker.wait(LONG) == 8
        assert (seen["was_preloaded"], seen["num_threads"]) == (False, 1)


def test_handler_for_the_death_of_children_makes_a_process_unfit_to_fork() -> None:
    """It would reap the workers."""
    ignoring = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
    code = f"{ignoring}; from training.cluster.forking import unfit; print(unfit())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "SIGCHLD has a handler\n"


@pytest.mark.slow
def test_recipe_that_changed_since_is_imported_again_and_workers_go_on(tmp_path: Path) -> None:
    with zygote_for(preset_beside(tmp_path, RECIPE.format(answer=1), "changing")) as zygote:
        bystander, seen = start_saying(zygote, recipe="changing", sleeps=True)
        assert seen["answer"] == 1
        first = zygote.pid
        for answer in (22, 1):  # back to what it was, too
            (tmp_path / "changing.py").write_text(RECIPE.format(answer=answer))
            worker, seen = start_saying(zygote, recipe="changing")
            assert worker.wait(LONG) == 0
            assert seen["answer"] == answer
        assert (zygote.pid, bystander.poll()) == (first, None)
        os.kill(bystander.pid, signal.SIGKILL)
        assert bystander.wait(LONG) == -signal.SIGKILL
        (tmp_path / "changing.py").unlink()
        worker, seen = start_saying(zygote, recipe="changing")
        assert worker.wait(LONG) == 0
        assert not seen["was_preloaded"]


def test_zygote_that_cannot_have_one_thread_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with zygote_for(tiny_preset()) as zygote, pytest.raises(InfrastructureError, match="there are 2 threads"):
        zygote.start({}, {})
