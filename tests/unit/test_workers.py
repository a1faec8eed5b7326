"""A node's workers, as its agent sees them: how they end, and whom it blames. The processes are real, what they do is
a line of Python."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.unit.tiny import tiny_preset
from training.cluster.workers import Hand, Outcome, RankSight, Workers
from training.control import EXIT_STOPPED, Channel, Order
from training.errors import InfrastructureError
from training.runs.job import Job
from training.runs.record import Member, Record
from training.s3.objectstore import StoreLocation

BEGIN = """
import json, os, signal, socket, sys
agent = socket.socket(fileno=int(sys.argv[1]))
call = b""
while not call.endswith(b"\\n"):
    call += socket.recv_fds(agent, 1, 1)[0]
"""
SAY = "agent.sendall(json.dumps({}).encode() + b'\\n')\n"
OBEY = f"agent.recv(99)\nsys.exit({EXIT_STOPPED})\n"


HANG_SECONDS, TICK_SECONDS = 8.0, 2.0


@pytest.fixture(autouse=True)
def _time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who is slow to begin is killed before it has said what a test is about."""
    monkeypatch.setattr("training.cluster.workers.STOP_SECONDS", 600.0)


class Clock:
    """The loop that the workers' agent runs in, but for its time: that goes on when a test says so."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self.now = loop, 0.0

    def time(self) -> float:
        self.now += 0.001
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


def say(**note: Any) -> str:
    return SAY.format(json.dumps(note).replace("false", "False").replace("true", "True"))


def fail(class_name: str, message: str, *, step: int = 4, **more: Any) -> str:
    return say(event="failed", class_name=class_name, message=message, step=step, **more) + "sys.exit(1)\n"


class Script:
    """A worker that does what is written."""

    def __init__(self, text: str, descriptors: Mapping[str, int]) -> None:
        control = descriptors["control_fd"]
        self._process = subprocess.Popen([sys.executable, "-c", BEGIN + text, str(control)], pass_fds=[control])
        self._pidfd = os.pidfd_open(self._process.pid)

    def fileno(self) -> int:
        return self._pidfd

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()


def outcome(
    *scripts: str,
    act: Callable[[Workers], None] = lambda workers: None,
    may_time_pass: Callable[[Sequence[RankSight]], bool] = lambda sights: False,
    before: Callable[[Workers], None] = lambda workers: None,
    then: Callable[[Workers], None] = lambda workers: None,
    later: Sequence[str] = (),
    may_stay: bool = False,
) -> Outcome:
    """Of a group of one node with these workers, and `then` a look at what is left. What is forked `later` does what is
    written there; if nothing is, nothing can be forked. Who gives no sign of life is hung only as far as time may pass.
    """
    job = Job(
        key="k",
        generation=0,
        preset=tiny_preset(),
        dataset_digest="d",
        location=StoreLocation(endpoint=None, bucket="b"),
    )
    object.__setattr__(job.preset.launch, "processes_per_node", len(scripts))

    async def follow() -> Outcome:
        clock = Clock(asyncio.get_running_loop())
        ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        left = iter([*scripts, *later])

        def start(order: dict[str, Any], descriptors: Mapping[str, int]) -> Script:
            script = next(left, None)
            if script is None:
                raise InfrastructureError("no worker could be forked")
            return Script(script, descriptors)

        member = Member(node=1, incarnation="i", address="127.0.0.1", port=1)
        workers = Workers(
            job=job,
            node=1,
            record=Record(key="k", token=3, members=(member,)),
            start=start,
            slots=[(0, 0, 0)] * len(scripts),
            on_end=ended.set_result,
            may_stay=may_stay,
        )
        its_asyncio = SimpleNamespace(get_running_loop=lambda: clock)
        with socket.socket() as listener, mock.patch("training.cluster.workers.asyncio", its_asyncio):
            before(workers)
            workers.begin(listener)
            act(workers)
            async with asyncio.timeout(240):
                while not ended.done():
                    if may_time_pass(workers.sights(clock.now)):
                        clock.now += TICK_SECONDS
                    workers.kill_hung(clock.time(), hang_seconds=HANG_SECONDS)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(ended), 0.02)
            then(workers)
            workers.kill()
        return ended.result()

    return asyncio.run(follow())


PEER_LOST = fail("PeerLost", "gloo: connection closed")
BUG = fail("Exception", "list index out of range")
NOT_FINITE = fail("DeterministicError", "the loss is nan")
KILLED = "os.kill(os.getpid(), signal.SIGKILL)\n"


@pytest.mark.parametrize(
    ("scripts", "cause"),
    [
        ([PEER_LOST, NOT_FINITE], "the loss is nan"),
        ([PEER_LOST, BUG, PEER_LOST], "list index out of range"),
        ([BUG, NOT_FINITE], "the loss is nan"),
        ([OBEY, KILLED], "worker killed by signal 9"),
        ([OBEY, "sys.exit(7)\n"], "worker exited with 7"),
        ([PEER_LOST, OBEY], "gloo: connection closed"),
    ],
)
def test_the_departure_names_the_worker_that_failed_by_itself(scripts: list[str], cause: str) -> None:
    found = outcome(*scripts)
    assert found.maybe_departure is not None
    assert (found.maybe_departure.cause, found.maybe_departure.token, found.maybe_departure.node) == (cause, 3, 1)
    assert not found.is_finished


def test_workers_that_are_done_have_finished_the_run() -> None:
    done = say(event="began", step=5) + say(event="step", step=6)
    assert outcome(done, done) == Outcome(step=6, is_finished=True, maybe_departure=None)


def test_workers_that_are_told_to_stop_are_nobodys_fault() -> None:
    stopped = say(event="began", step=5) + OBEY
    assert outcome(stopped, stopped, act=Workers.stop) == Outcome(step=5, is_finished=False, maybe_departure=None)


def test_an_order_reaches_every_worker() -> None:
    assert_regroup = f"assert json.loads(agent.makefile().readline())['do'] == 'regroup'\nsys.exit({EXIT_STOPPED})\n"
    found = outcome(assert_regroup, assert_regroup, act=lambda workers: workers.ask(Order(do="regroup")))
    assert found == Outcome(step=0, is_finished=False, maybe_departure=None)


def test_a_worker_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.cluster.workers.STOP_SECONDS", 0.2)
    found = outcome("signal.pause()\n", act=Workers.stop)
    assert found == Outcome(step=0, is_finished=False, maybe_departure=None)


def test_a_worker_without_a_sign_of_life_is_replaced() -> None:
    silent = say(event="began", step=5) + "signal.pause()\n"
    found = outcome(silent, OBEY, may_time_pass=lambda sights: sights[0].step == 5)
    assert found.maybe_departure is not None
    assert found.maybe_departure.class_name == "Hung"
    assert "no sign of life" in found.maybe_departure.cause
    assert found.step == 5


BEATING = """
import threading, time
def beat():
    while True:
        agent.sendall(json.dumps({"event": "beat", "is_waiting": IS_WAITING}).encode() + b"\\n")
        time.sleep(0.05)
threading.Thread(target=beat, daemon=True).start()
"""


def test_who_does_not_come_to_the_end_of_a_step_is_hung_and_who_waits_is_not() -> None:
    step = say(event="began", step=5) + say(event="step", step=6)
    stuck = step + BEATING.replace("IS_WAITING", "False") + "signal.pause()\n"
    waits = step + BEATING.replace("IS_WAITING", "True") + OBEY

    def both_have_beaten(sights: Sequence[RankSight]) -> bool:
        """Since time passed."""
        return all(sight.step == 6 and sight.silent_seconds < TICK_SECONDS for sight in sights)

    found = outcome(waits, stuck, may_time_pass=both_have_beaten)
    assert found.maybe_departure is not None
    assert "does not come to the end of its step" in found.maybe_departure.cause
    assert found.maybe_departure.step == 6


def test_signals_are_named() -> None:
    found = outcome(f"os.kill(os.getpid(), {int(signal.SIGTERM)})\n")
    assert found.maybe_departure is not None
    assert found.maybe_departure.class_name == "Killed"
    assert found.maybe_departure.cause == "worker killed by signal 15"


@pytest.mark.parametrize("sign", [signal.SIGSEGV, signal.SIGABRT])
def test_who_dies_of_what_it_did_has_crashed(sign: signal.Signals) -> None:
    found = outcome(f"os.kill(os.getpid(), {int(sign)})\n")
    assert found.maybe_departure is not None
    assert (found.maybe_departure.class_name, found.maybe_departure.cause) == (
        "Crashed",
        f"worker killed by {sign.name}",
    )


def test_the_records_that_a_worker_names_are_told() -> None:
    found = outcome(fail("DeterministicError", "a loss"), fail("DeterministicError", "b loss", records=["a.csv:3"]))
    assert found.maybe_departure is not None
    assert (found.maybe_departure.cause, found.maybe_departure.records) == ("b loss", ("a.csv:3",))


# ---- processes that stay ---------------------------------------------------------------------------------------------

LEFT = say(event="began", step=5) + say(event="left", step=6, class_name="PeerLost", message="gloo: connection closed")
LEFT += "signal.pause()\n"


def test_who_left_stays_and_tells_why() -> None:
    hands = {}
    found = outcome(LEFT, LEFT, then=lambda workers: hands.update(workers.hands), may_stay=True)
    assert sorted(hands) == [0, 1]
    assert found.step == 6
    assert not found.is_finished
    assert found.maybe_departure is not None
    assert (found.maybe_departure.class_name, found.maybe_departure.step) == ("PeerLost", 6)


def test_when_one_leaves_the_others_are_told_to_and_nobody_is_to_blame() -> None:
    wanted = say(event="left", step=6)
    cut = say(event="left", step=6, class_name="PeerLost", message="gloo: connection closed")
    told = "assert json.loads(agent.makefile().readline())['do'] == 'stop'\n" + cut + "signal.pause()\n"
    assert outcome(wanted + "signal.pause()\n", told, may_stay=True) == Outcome(
        step=6, is_finished=False, maybe_departure=None
    )


@pytest.mark.parametrize("later", [[], ["signal.pause()\n"]], ids=["nothing can be forked", "it can"])
def test_who_dies_is_replaced_at_once_if_that_can_be(later: list[str]) -> None:
    hands: dict[int, Hand] = {}
    found = outcome(LEFT, KILLED, later=later, then=lambda workers: hands.update(workers.hands), may_stay=True)
    assert sorted(hands) == [0, 1][: 1 + len(later)]
    assert found.maybe_departure is not None
    assert found.maybe_departure.cause == "worker killed by signal 9"


def test_who_ended_while_nobody_needed_it_is_not_called() -> None:
    """The group before left a process that has died since."""
    ours, theirs = socket.socketpair()
    gone = Hand(process=Script("", {"control_fd": theirs.fileno()}), channel=Channel(ours))
    gone.process.kill()
    gone.process._process.wait(120)  # type: ignore[attr-defined]
    done = say(event="step", step=6)

    def lend(workers: Workers) -> None:
        """Before they begin."""
        workers.hands = {0: gone}

    assert outcome(done, before=lend) == Outcome(step=6, is_finished=True, maybe_departure=None)
    assert ours.fileno() == -1
    theirs.close()
