"""A node's own job: why it is told to go, and a controller that is away when it is asked."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from infra.slurm import node
from infra.slurm.commands import Commands, Refusal
from infra.slurm.node import Job, Keeper, place_of
from tests.waiting import wait_until
from training.cluster.agent import EXIT_PREEMPTED
from training.errors import InfrastructureError, UserError

AWAY = "scontrol: error: Unable to contact slurm controller (connect failure)"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "PAUSE_SECONDS", 0.01)


def scontrol(folder: Path, *, says: str, num_away: int = 0) -> Commands:
    """A controller that answers after it was away for so many questions."""
    folder.mkdir(exist_ok=True)
    (folder / "asked").write_text("")
    path = folder / "scontrol"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/asked\n'
        f'[ $(wc -l < {folder}/asked) -le {num_away} ] && {{ echo "{AWAY}" >&2; exit 1; }}\necho "{says}"\n'
    )
    path.chmod(0o755)
    return Commands(folder=folder)


@pytest.mark.parametrize(
    ("words", "is_cancelled"),
    [
        ("JobState=RUNNING Reason=None", False),  # within the grace time of a preemption
        ("JobState=COMPLETING Reason=TimeLimit", False),
        ("JobState=COMPLETING Reason=None", True),
    ],
)
def test_why_a_node_is_told_to_go(tmp_path: Path, words: str, is_cancelled: bool) -> None:
    assert Job(commands=scontrol(tmp_path, says=words), name="7_0").is_cancelled() is is_cancelled


def test_without_an_answer_it_was_not_cancelled(tmp_path: Path) -> None:
    job = Job(commands=scontrol(tmp_path, says="JobState=COMPLETING", num_away=1), name="7_0")
    assert not job.is_cancelled()
    assert job.is_cancelled()


def test_a_request_to_be_requeued_waits_for_the_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(commands=scontrol(tmp_path, says="", num_away=3), name="7_0").requeue()
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 7_0"] * 4
    monkeypatch.setattr(node, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(InfrastructureError, match="Unable to contact"):
        Job(commands=scontrol(tmp_path, says="", num_away=100), name="7_0").requeue()


def test_a_node_is_reached_where_slurm_says(tmp_path: Path) -> None:
    found = place_of(scontrol(tmp_path, says="NodeName=n1 NodeAddr=127.0.0.1 State=IDLE"), "n1")
    assert found == {"UNBROKEN_NODE_ADDRESS": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def test_commands_fail_by_who_must_act(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no command .*/nowhere/squeue: .* \[slurm\] commands"):
        Commands(folder=tmp_path / "nowhere").run("squeue")
    refusing = scontrol(tmp_path, says="")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(Refusal, match="invalid partition"):
        refusing.run("scontrol")


def test_a_command_that_hangs_is_a_controller_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.slurm.commands.ANSWER_SECONDS", 0.2)
    commands = scontrol(tmp_path, says="")
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(InfrastructureError, match="did not answer scontrol"):
        commands.run("scontrol")


def keeper(folder: Path, code: str, *, is_cancelled: bool = False) -> Keeper:
    script = f"import signal, sys, time, pathlib; here = pathlib.Path({str(folder)!r}); {code}"
    return Keeper(command=[sys.executable, "-c", script], environment={}, is_cancelled=lambda: is_cancelled)


def test_an_agent_that_dies_is_started_again(tmp_path: Path) -> None:
    dies_twice = "n = len(list(here.iterdir())); (here / str(n)).touch(); sys.exit(1 if n < 2 else 0)"
    assert keeper(tmp_path, dies_twice).run() == 0
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("code", [0, 2, 4, EXIT_PREEMPTED])
def test_what_an_agent_ends_with_for_good(tmp_path: Path, code: int) -> None:
    assert keeper(tmp_path, f"sys.exit({code})").run() == code


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_node_that_is_told_to_go_passes_it_on_unless_nobody_wants_more(tmp_path: Path, is_cancelled: bool) -> None:
    leaves = (
        "signal.signal(signal.SIGTERM, lambda *_: ((here / 'left').touch(), sys.exit(75)));"
        " (here / 'there').touch(); time.sleep(60)"
    )
    started = keeper(tmp_path, leaves, is_cancelled=is_cancelled)

    def tell() -> None:
        wait_until(lambda: (tmp_path / "there").exists(), what="the agent to be there")
        os.kill(os.getpid(), signal.SIGTERM)

    telling = threading.Thread(target=tell)
    telling.start()
    assert started.run() == EXIT_PREEMPTED
    telling.join()
    assert (tmp_path / "left").exists() is not is_cancelled


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("NodeName=n1 State=IDLE", "NodeAddr of n1, '', "),
        (f"NodeAddr={'a' * 70}.example", "is no address"),
        ("NodeAddr=a..b", "is no address"),
        ("NodeAddr=192.0.2.1", "no interface of this machine has"),
    ],
)
def test_a_node_of_which_slurm_knows_no_address_is_named(tmp_path: Path, says: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place_of(scontrol(tmp_path, says=says), "n1")
