"""The whole chain disturbed at random: processes killed, servers away, the disk full. It ends as a calm run does."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.conftest import Stack, running_stack
from tests.faults.disturbances import MAX_AWAY_SECONDS, MIN_AWAY_SECONDS, Away, kills, outages
from tests.faults.evidence import write_evidence
from tests.faults.injectors import Kill
from tests.faults.pipeline_runs import MOMENTS, PipelineRun
from tests.flows.runs import last_json, run_keys
from tests.waiting import wait_until

SEEDS = range(1000, 1030)
STEPS = 200
PRESET = ("digits", "--json", "--set", f"train.steps={STEPS}", "--set", "train.checkpoint_every_steps=20")
LONGEST_DELAY_SECONDS = {"asked for": 12.0, "sharded": 6.0, "training": 12.0, "trained": 8.0}
END_SECONDS = 400.0
SHORT_LIVED = ("agent", "rank", "zygote", "command")
SHORT_DELAY_SECONDS = 3.0
DISK_MIB = 2560
"""`unbroken run` wants 1 GiB to be free."""


@pytest.fixture(scope="module")
def stack_on_small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose home can be filled. Skips the test where this user may not mount."""
    disk = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    try:
        with running_stack(disk / "home") as stack:
            yield stack
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def expected(stack_on_small_disk: Stack) -> str:
    """The sha256 of the weights of a run that nothing befell."""
    done = stack_on_small_disk.command("train", *PRESET)
    assert done.returncode == 0, done.stdout + done.stderr
    weights: str = last_json(done.stdout)["weights_sha256"]
    return weights


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Written down at the end, if every seed ended well."""
    found: list[dict[str, Any]] = []
    yield found
    if len(found) == len(SEEDS):
        write_evidence("disturbed-pipeline", rows=sorted(found, key=lambda row: int(row["seed"])))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_disturbed_pipeline(stack_on_small_disk: Stack, seed: int, expected: str, rows: list[dict[str, Any]]) -> None:
    rows.append(disturb(stack_on_small_disk, seed=seed, expected=expected, with_disk=True))


def disturb(stack: Stack, *, seed: int, expected: str, with_disk: bool) -> dict[str, Any]:
    """One run, with a dataset and a run key of its own; what befell it, and what became of it."""
    begun = time.monotonic()
    chance = random.Random(seed)
    number = random.SystemRandom().randrange(100, 1_000_000)
    run = PipelineRun(stack, f"disturbed-{number}", frozenset(run_keys(stack)))
    own = (
        f"data.name={run.dataset}",
        f"train.shuffle_window_shards={number}",
    )  # more than it has: the order is the same
    command = stack.start("run", *PRESET, *(word for value in own for word in ("--set", value)))
    plan = planned(chance, command.pid, with_disk=with_disk)
    try:
        _befall(stack, run, plan, chance)
        run.wait_until_completed(timeout_seconds=END_SECONDS)
        seconds = time.monotonic() - begun
        output, _ = command.communicate(timeout=240)
    finally:
        command.kill()
    was_killed = any(each.fault.name == "command" for each in plan)
    assert command.returncode == (-9 if was_killed else 0), output
    assert all(each.fault.fired for each in plan), [each.fault.name for each in plan if not each.fault.fired]
    wait_until(lambda: stack.command("status").returncode == 0, what="the stack to be well")
    record = run.record()
    assert record.result is not None
    assert record.result.weights_sha256 == expected
    run.require_told_once(STEPS)
    wait_until(lambda: not run.leftovers(), what=f"nothing to be left of it, and not {run.leftovers()}")
    again = run.done_again(STEPS)
    assert not any(again.values()), again
    return {
        "seed": seed,
        "befell": [each.told() for each in plan],
        "seconds": round(seconds, 1),
        "flow_run_states": run.states(),
        "attempts": len(record.attempt_starts),
        "done_again": again,
        "weights_sha256": record.result.weights_sha256,
    }


@dataclass
class Planned:
    """A fault, and when it is to strike."""

    fault: Kill | Away
    moment: str
    delay_seconds: float
    """After the moment."""
    lasts_seconds: float = 0.0

    def told(self) -> str:
        lasts = f", for {self.lasts_seconds:.1f} s" if self.lasts_seconds else ""
        return f"{self.fault.name}: {self.delay_seconds:.1f} s after {self.moment!r}{lasts}"


def planned(chance: random.Random, command: int, *, with_disk: bool) -> list[Planned]:
    """Three processes to be killed, and one outage."""
    return [
        *(_at_random(chance, kill) for kill in chance.sample(kills(command), 3)),
        _at_random(
            chance,
            chance.choice(outages(with_disk=with_disk)),
            lasts_seconds=chance.uniform(MIN_AWAY_SECONDS, MAX_AWAY_SECONDS),
        ),
    ]


def _at_random(chance: random.Random, fault: Kill | Away, *, lasts_seconds: float = 0.0) -> Planned:
    """Not when its victim may have ended by itself."""
    moment = chance.choice(MOMENTS[:3] if fault.name in SHORT_LIVED else MOMENTS)
    longest = LONGEST_DELAY_SECONDS[moment]
    if fault.name in (*SHORT_LIVED, "flow") and moment in MOMENTS[2:]:
        longest = SHORT_DELAY_SECONDS
    return Planned(fault, moment, chance.uniform(0, longest), lasts_seconds=lasts_seconds)


def _befall(stack: Stack, run: PipelineRun, plan: Sequence[Planned], chance: random.Random) -> None:
    """Strike, and heal what lasts; a fault without a victim waits until there is one."""
    waiting, due, healing = list(plan), [], []
    deadline = time.monotonic() + END_SECONDS
    while (waiting or due) and (now := time.monotonic()) < deadline:
        come = [each for each in waiting if run.has_come_to(each.moment)]
        waiting = [each for each in waiting if each not in come]
        due += [(now + each.delay_seconds, each) for each in come]
        for at, each in [pair for pair in due if pair[0] <= now]:
            each.fault.fire(stack, chance)
            if each.fault.fired:
                due.remove((at, each))
                if isinstance(each.fault, Away):  # by itself: to look how far the run is may take as long as it lasts
                    healing.append(threading.Timer(each.lasts_seconds, each.fault.heal))
                    healing[-1].start()
        time.sleep(0.1)
    for timer in healing:
        timer.join()
