"""Training that loses everything at once, at any moment, and goes on with another number of ranks each time."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import pytest

from tests.conftest import Stack
from tests.faults.evidence import write_evidence
from tests.faults.moments import AFTER_COMMIT, MOMENTS, call_at
from tests.faults.proxy import LosingProxy
from tests.flows.runs import last_json, loss_history, processes, run_keys, wait_for_step
from tests.waiting import wait_until
from training.runs.record import RunRecord

EVERY = 10
MAX_RANKS = 4
MAX_CHECKPOINTS = 6
"""Between two stops at most: what is seen of a run lags behind it, and none may be over before it is stopped."""

MID_STEP = "a step"
STOPS = {MID_STEP: None, **MOMENTS, "the record was replaced": AFTER_COMMIT}


class Training:
    """One `unbroken train` before a proxy of its own, which is killed with all its agents and ranks."""

    def __init__(self, stack: Stack, proxy: LosingProxy, short: Sequence[str], *, num_ranks: int) -> None:
        self._stack = stack
        self._proxy = proxy
        self._is_killed = threading.Event()
        self.num_killed = 0
        options = ("--json", "--ranks", str(num_ranks), *short)
        self._command = stack.start("train", "digits", *options, s3_endpoint=proxy.endpoint)

    def kill(self) -> None:
        """The command, the agents and the ranks, with `kill -9`."""
        ranks = processes(self._stack, "training.cluster.worker")
        for process in (*processes(self._stack, "training.cluster.agent"), *ranks, psutil.Process(self._command.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.num_killed = len(ranks)
        self._is_killed.set()

    def kill_at(self, moment: tuple[str, str, int], *, step: int) -> None:
        call_at(self._proxy, moment, self.kill, step=step)
        assert self._is_killed.wait(timeout=120), "the moment never came"

    def wait_until_dead(self) -> None:
        self._command.communicate(timeout=240)
        wait_until(lambda: not processes(self._stack, "training.cluster.worker"), what="all ranks to be gone")

    def result(self) -> dict[str, Any]:
        output, _ = self._command.communicate(timeout=240)
        found: dict[str, Any] = last_json(output)
        return found


def stop_once(
    stack: Stack, proxy: LosingProxy, name: str, chance: random.Random, before: set[str], short: Sequence[str]
) -> Any:
    """Train on some number of ranks, kill everything at the moment of that name, and say what happened."""
    run = found_run(stack, before)
    checkpoints = run.read().checkpoints if run is not None else ()
    newest = checkpoints[-1].step if checkpoints else 0
    num_ranks = chance.randint(1, MAX_RANKS)
    step = newest + EVERY * chance.randint(1, MAX_CHECKPOINTS)
    training = Training(stack, proxy, short, num_ranks=num_ranks)
    moment = STOPS[name]
    if moment is None:
        step += chance.randint(1, EVERY - 1)
        run = wait_for_step(stack, before, step=step)
        training.kill()
    else:
        training.kill_at(moment, step=step)
    training.wait_until_dead()
    run = found_run(stack, before)
    assert run is not None
    assert stack.command("runs", "cancel", run.run_key).returncode == 0
    return {"at": name, "of_step": step, "num_ranks": num_ranks, "num_killed": training.num_killed}


def found_run(stack: Stack, before: set[str]) -> RunRecord | None:
    """The run that appeared since `before`."""
    runs = [RunRecord(stack.store, key) for key in run_keys(stack) - before]
    return next((run for run in runs if run.find() is not None), None)


def history(stack: Stack, run: RunRecord) -> list[tuple[int, float]]:
    tracked = run.read().tracking_run_id
    assert tracked is not None
    return loss_history(stack, tracked)


def elastic(stack: Stack, *, seed: int, stops: Sequence[str], steps: int) -> dict[str, Any]:
    """A run stopped again and again, each time gone on with another number of ranks; beside a calm one on one rank."""
    chance = random.Random(seed)
    before = run_keys(stack)
    short = ("--steps", str(steps), "--set", f"train.checkpoint_every_steps={EVERY}", "--set", f"seed={seed}")
    with LosingProxy(str(stack.location.endpoint)) as proxy:
        rows = [stop_once(stack, proxy, name, chance, before, short) for name in stops]
        result = Training(stack, proxy, short, num_ranks=chance.randint(1, MAX_RANKS)).result()
    run = found_run(stack, before)
    assert run is not None
    losses = history(stack, run)
    calm, _ = stack.start("train", "digits", "--json", "--fresh", "--ranks", "1", *short).communicate(timeout=240)
    assert all(row["num_killed"] for row in rows), "every stop found ranks to kill"
    assert len(losses) == steps
    return {
        "seed": seed,
        "stops": rows,
        "state_sha256": result["state_sha256"],
        "same_state": result["state_sha256"] == last_json(calm)["state_sha256"],
        "same_loss_history": losses == history(stack, run),
    }


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(stack: Stack) -> None:
    row = elastic(stack, seed=7, stops=["the manifest was read back"], steps=200)
    assert row["same_state"]
    assert row["same_loss_history"]


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_stops_on_any_number_of_ranks(stack: Stack) -> None:
    """Each moment is the last thing that some run saw, twice or more."""
    names = list(STOPS) * 3
    rows = [elastic(stack, seed=200 + n, stops=names[4 * n : 4 * n + 4], steps=600) for n in range(5)]
    write_evidence("elastic-training", rows=rows)
    assert all(row["same_state"] and row["same_loss_history"] for row in rows)
