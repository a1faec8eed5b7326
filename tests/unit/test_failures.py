"""The classes of failure: which one something is, how often it is tried again, and what a user is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.cluster.membership import failure_to_report
from training.cluster.worker import _class_name
from training.errors import DeterministicError
from training.preset_file import load_preset
from training.runs.failures import CLASSES, crash_to_explain, num_failures, of_exit_code, oom_kills
from training.runs.record import CheckpointRef, Departure, Failure, Record

EMPTY = Record(key="k")


def departures(*kinds: tuple[str, int], cause: str = "boom") -> Record:
    """Of one group after another: (class, step)."""
    return replace(
        EMPTY,
        token=len(kinds),
        departures=tuple(
            Departure(token=token, node=0, cause=cause, step=step, class_name=kind)
            for token, (kind, step) in enumerate(kinds, start=1)
        ),
    )


def failure(record: Record, *, max_restarts: int = 20) -> Failure | None:
    return failure_to_report(record, record.departures[-1], max_restarts=max_restarts)


def test_a_lack_of_memory_is_named_and_not_tried_for_ever() -> None:
    """Whatever the steps; and whoever said so, a worker or the kernel."""
    twice = departures(("OutOfMemoryError", 5), ("OutOfMemoryError", 9))
    assert failure(twice) is None
    found = failure(
        departures(("OutOfMemoryError", 5), ("Killed", 5), ("OutOfMemoryError", 9), ("OutOfMemoryError", 2))
    )
    assert found is not None
    assert found.kind == "OutOfMemoryError"
    assert "out of memory, 3 times since the newest checkpoint: boom" in found.message
    for key in ("train.batch_size", "train.virtual_workers", "launch.processes_per_node"):
        assert key in found.message
        table, _, name = key.partition(".")
        assert hasattr(getattr(load_preset("digits"), table), name), "advice that can be taken"


def test_a_lack_of_memory_with_a_checkpoint_between_is_tried_again() -> None:
    record = departures(*[("OutOfMemoryError", 5)] * 4)
    assert failure(replace(record, checkpoints=(CheckpointRef(step=4, token=2, sha256=""),))) is None


def test_preemption_never_counts() -> None:
    assert failure(departures(*[("Preempted", 5)] * 50), max_restarts=0) is None


def test_a_rack_that_is_lost_is_one_failure_and_a_preemption_is_none() -> None:
    rack = [Departure(token=1, node=node, cause="silent", step=2, class_name="NodeLost") for node in range(3)]
    preempted = Departure(token=2, node=0, cause="SIGTERM", step=2, class_name="Preempted")
    assert num_failures(Record(key="k", departures=(*rack, preempted))) == 1


def test_an_error_for_good_keeps_the_records_that_cause_it() -> None:
    record = departures(("DeterministicError", 5))
    latest = replace(record.departures[0], records=("a.csv:3",))
    found = failure_to_report(replace(record, departures=(latest,)), latest, max_restarts=20)
    assert found is not None
    assert found.records == ("a.csv:3",)


def test_a_crash_is_explained_after_the_second_and_ends_the_run_at_the_third() -> None:
    once, twice = departures(("Crashed", 5)), departures(("Crashed", 5), ("Killed", 3), ("Crashed", 5))
    assert (crash_to_explain(once), failure(once)) == (None, None)
    assert (crash_to_explain(twice), failure(twice)) == (5, None)
    found = failure(departures(*[("Crashed", 5)] * 3))
    assert found is not None
    assert found.kind == "DeterministicError"
    assert found.message.startswith("three times the same failure at step 5: boom. Replays before the last time died")
    assert "launch.collective_timeout_seconds" in found.message


def test_crashes_that_came_further_or_were_forgiven_are_not_alike() -> None:
    assert crash_to_explain(departures(("Crashed", 5), ("Crashed", 9))) is None
    assert crash_to_explain(departures(("Crashed", 5), ("Crashed", 4))) == 4, "of what is read ahead, at about a step"
    forgiven = replace(departures(("Crashed", 5), ("Crashed", 5)), forgiven_token=1)
    assert crash_to_explain(forgiven) is None


def test_every_class_that_a_departure_can_have_is_in_the_table() -> None:
    assert {CLASSES[kind].name for kind in CLASSES} == {
        "infrastructure",
        "preemption",
        "deterministic",
        "configuration",
        "out of memory",
    }


@pytest.mark.parametrize(
    ("code", "is_out_of_memory", "expected"),
    [
        (7, True, ("Killed", "worker exited with 7")),
        (-9, False, ("Killed", "worker killed by signal 9")),
        (-9, True, ("OutOfMemoryError", "worker killed by the kernel, for lack of memory")),
        (-11, True, ("Crashed", "worker killed by SIGSEGV")),
    ],
)
def test_exit_codes(code: int, is_out_of_memory: bool, expected: tuple[str, str]) -> None:
    assert of_exit_code(code, is_out_of_memory=is_out_of_memory) == expected


@pytest.mark.parametrize("allocate", [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 60)])
def test_a_failed_allocation_is_told_as_that(allocate: object) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate()  # type: ignore[operator]
    assert _class_name(caught.value) == "OutOfMemoryError"
    assert _class_name(ValueError("no")) == "Exception"
    assert _class_name(DeterministicError("no")) == "DeterministicError"


# ---- the kernel's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 64 MB, which a process may enter."""
    versions = {"memory": "memory.limit_in_bytes", "": "memory.max"}
    for controller, limit in versions.items():
        folder = Path("/sys/fs/cgroup") / controller / f"unbroken-test-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / limit).write_text(str(64 << 20))
        except OSError:
            if folder.exists():
                folder.rmdir()
            continue
        yield folder
        folder.rmdir()
        return
    pytest.skip("no control group can be made here: needs root and the memory controller")


GREEDY = """
import os, sys
from pathlib import Path
from training.runs.failures import oom_kills
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = oom_kills()
child = os.fork()
if child == 0:
    Path("/proc/self/oom_score_adj").write_text("1000")
    held = b"x" * (256 << 20)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.WTERMSIG(status), oom_kills() - before)
"""


def test_what_the_kernel_kills_for_lack_of_memory_is_counted(small_group: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GREEDY, str(small_group)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["9", "1"], done.stderr


def test_no_counter_is_no_kill(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/nowhere\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path) >= 0
