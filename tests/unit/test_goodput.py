"""The goodput model: simulation and closed form agree, every nanosecond is booked once, and worse machines do worse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.recovery.calibration import calibrate
from benchmarks.recovery.figure import COLOURS, draw
from benchmarks.recovery.goodput import as_markdown, main
from benchmarks.recovery.model import DAY_SECONDS, Parameters, Policy, Replacement, estimate, with_best_interval
from benchmarks.recovery.scenarios import (
    LLAMA3,
    LLAMA3_GOODPUT_ABOVE,
    LLAMA3_NODES,
    NODE_COUNTS,
    QUICK,
    SCENARIOS,
    SURVIVORS,
    Point,
    at,
    llama3_allowed_loss_seconds,
    llama3_goodput,
)
from benchmarks.recovery.simulation import NANOSECONDS, Breakdown, Failure, poisson_failures, simulate

HOUR_SECONDS = 3600.0

PLAIN = Parameters(
    num_nodes=8,
    node_mtbf_seconds=DAY_SECONDS,
    step_seconds=2.0,
    detection_seconds=1.0,
    regroup_seconds=3.0,
    state_bytes=10.0,
    bandwidth_bytes_per_second=2.0,
    checkpoint_every_seconds=100.0,
    checkpoint_stall_seconds=4.0,
    checkpoint_load_seconds=7.0,
    replacement_seconds=0.0,
    policy=Policy.SURVIVORS,
)


def failing(*moments: tuple[float, int]) -> list[Failure]:
    """Nodes at times in seconds; never all copies by bad luck."""
    return [Failure(nanoseconds=int(second * NANOSECONDS), node=node, luck=0.99) for second, node in moments]


def seconds(p: Parameters, *moments: tuple[float, int], horizon: float = 1000.0) -> dict[str, float]:
    """The parts that are not 0."""
    done = simulate(p, horizon_seconds=horizon, failures=failing(*moments))
    return {part: value for part, value in done.seconds().items() if value}


def test_without_failures_only_checkpoints_cost() -> None:
    assert seconds(PLAIN, horizon=1040.0) == {"productive": 1000.0, "checkpoint": 40.0}


def test_survivors_redo_the_broken_step_and_a_restart_all_since_the_checkpoint() -> None:
    lost = {"detection": 1.0, "regroup": 3.0}
    survivors = seconds(PLAIN, (51.0, 3), horizon=100.0)
    assert survivors == {"productive": 90.0, **lost, "transfer": 5.0, "redone": 1.0}
    restart = seconds(replace(PLAIN, policy=Policy.RESTART), (51.0, 3), horizon=100.0)
    assert restart == {"productive": 38.0, **lost, "transfer": 7.0, "redone": 51.0}


def test_a_broken_checkpoint_does_not_count() -> None:
    """The failure comes 2 s into the stall, with 100 s of work unsaved."""
    restart = seconds(replace(PLAIN, policy=Policy.RESTART), (102.0, 3), horizon=150.0)
    assert restart["redone"] == 100.0
    assert seconds(PLAIN, (102.0, 3), horizon=150.0)["checkpoint"] == 2.0 + 4.0


def test_a_failure_during_a_recovery_begins_it_anew() -> None:
    found = seconds(PLAIN, (50.0, 3), (53.0, 2), horizon=100.0)
    assert found == {"productive": 88.0, "detection": 2.0, "regroup": 5.0, "transfer": 5.0}


def test_a_missing_node_cannot_fail() -> None:
    assert seconds(PLAIN, (50.0, 3), (53.0, 3)) == seconds(PLAIN, (50.0, 3))


def test_all_wait_for_a_replacement_or_go_on_slower_without_it() -> None:
    slow = replace(PLAIN, replacement_seconds=30.0, virtual_workers_per_node=7)
    assert seconds(slow, (50.0, 3), horizon=100.0)["waiting"] == 30.0
    shrunk = seconds(replace(slow, replacement=Replacement.SHRINK), (50.0, 3), horizon=100.0)
    # Back at 54, 27 s at 7/8, and at 81 a pause of 3 + 5 for the replacement.
    assert shrunk["missing"] == pytest.approx(27.0 / 8)
    assert (shrunk["regroup"], shrunk["transfer"]) == (6.0, 5.0)
    assert "waiting" not in shrunk


def test_the_loss_of_all_copies_falls_back_to_the_checkpoint() -> None:
    """Eight nodes in four groups of two: 1 and 5 hold the same, 1 and 2 do not."""
    assert simulate(PLAIN, horizon_seconds=200.0, failures=failing((51.0, 1), (53.0, 2))).num_reloads == 0
    lost = simulate(PLAIN, horizon_seconds=200.0, failures=failing((50.0, 1), (53.0, 5)))
    assert lost.num_reloads == 1
    assert lost.seconds()["redone"] == 50.0
    three = replace(PLAIN, num_copies=4)
    assert simulate(three, horizon_seconds=200.0, failures=failing((51.0, 1), (53.0, 5))).num_reloads == 0
    unlucky = replace(PLAIN, all_copies_lost_probability=1.0)
    assert simulate(unlucky, horizon_seconds=200.0, failures=failing((51.0, 1))).num_reloads == 1


def test_what_is_lost_stays_lost_through_further_failures() -> None:
    """Node 2 has a living copy, but 1 and 5 had none: all load the checkpoint in the end."""
    found = seconds(PLAIN, (50.0, 1), (53.0, 5), (54.0, 2), horizon=80.0)
    assert found["transfer"] == 7.0


def test_a_restored_copy_counts_again() -> None:
    assert simulate(PLAIN, horizon_seconds=200.0, failures=failing((51.0, 1), (90.0, 5))).num_reloads == 0
    shrunk = replace(PLAIN, replacement=Replacement.SHRINK, replacement_seconds=60.0)
    assert simulate(shrunk, horizon_seconds=200.0, failures=failing((51.0, 1), (90.0, 5))).num_reloads == 1


def parameters() -> st.SearchStrategy[Parameters]:
    amounts = st.floats(0.0, 30.0)
    return st.builds(
        Parameters,
        num_nodes=st.integers(4, 64),
        node_mtbf_seconds=st.floats(0.01, 30.0).map(lambda days: days * DAY_SECONDS),
        step_seconds=st.floats(0.1, 10.0),
        detection_seconds=amounts,
        regroup_seconds=amounts,
        regroup_seconds_per_doubling=st.floats(0.0, 1.0),
        state_bytes=amounts,
        bandwidth_bytes_per_second=st.floats(1.0, 10.0),
        checkpoint_every_seconds=st.floats(10.0, 1000.0),
        checkpoint_stall_seconds=amounts,
        checkpoint_load_seconds=amounts,
        replacement_seconds=st.floats(0.0, 600.0),
        policy=st.sampled_from(Policy),
        replacement=st.sampled_from(Replacement),
        num_copies=st.integers(1, 4),
        all_copies_lost_probability=st.floats(0.0, 1.0),
        virtual_workers_per_node=st.integers(1, 16),
    )


@given(p=parameters(), seed=st.integers(0, 2**32 - 1))
@settings(derandomize=True, max_examples=100)
def test_every_nanosecond_is_booked_to_one_part(p: Parameters, seed: int) -> None:
    done = simulate(p, horizon_seconds=HOUR_SECONDS, seed=seed)
    assert done.wall == HOUR_SECONDS * NANOSECONDS
    assert min(done.parts().values()) >= 0
    assert done.num_reloads <= done.num_failures
    if p.policy is Policy.RESTART:
        assert done.num_reloads == done.num_failures
    if p.replacement is Replacement.SPARE:
        assert done.missing == 0


def test_a_seed_decides_everything() -> None:
    runs = [simulate(SURVIVORS, horizon_seconds=DAY_SECONDS, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_failures_are_as_many_as_the_machines_have() -> None:
    found = len(poisson_failures(LLAMA3, horizon_seconds=540 * DAY_SECONDS, seed=0))
    assert found == pytest.approx(4660, abs=4 * 4660**0.5)


WORSE: dict[str, Callable[[float], float]] = {
    "node_mtbf_seconds": lambda value: value / 2,
    "detection_seconds": lambda value: value + 1,
    "regroup_seconds": lambda value: value + 1,
    "state_bytes": lambda value: value + 10,
    "checkpoint_stall_seconds": lambda value: value + 1,
    "checkpoint_load_seconds": lambda value: value + 1,
    "replacement_seconds": lambda value: value + 10,
    "all_copies_lost_probability": lambda value: min(1.0, value + 0.1),
}


@pytest.mark.parametrize("name", WORSE)
@given(p=parameters())
@settings(derandomize=True, max_examples=25)
def test_the_estimate_falls_with_every_worse_machine(name: str, p: Parameters) -> None:
    """The last falls only where a reload costs more than the repair that it takes the place of."""
    if name == "all_copies_lost_probability":
        p = replace(p, checkpoint_load_seconds=p.transfer_seconds + p.group_seconds + 1)
    worse: dict[str, Any] = {name: WORSE[name](getattr(p, name))}
    assert 0 <= estimate(replace(p, **worse)) <= estimate(p) * (1 + 1e-9) <= 1 + 1e-9


@pytest.mark.parametrize(("name", "value"), [("node_mtbf_seconds", 1e6), ("detection_seconds", 60.0)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_simulation_falls_with_them_too(scenario: str, name: str, value: float) -> None:
    p = replace(SCENARIOS[scenario], num_nodes=16_384, detection_seconds=1.0)
    change: dict[str, Any] = {name: value}
    run, worse = (simulate(q, horizon_seconds=3 * DAY_SECONDS).goodput for q in (p, replace(p, **change)))
    assert worse < run


@pytest.mark.parametrize("num_nodes", [2048, 131_072])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_simulation_and_closed_form_agree(scenario: str, num_nodes: int) -> None:
    """Within 1 % where failures are few and leave much to chance, and within 0.5 % where they are many."""
    p = at(SCENARIOS[scenario], num_nodes)
    found = simulate(p, horizon_seconds=60 * DAY_SECONDS if num_nodes == 2048 else 15 * DAY_SECONDS).goodput
    assert found == pytest.approx(estimate(p), abs=0.01 if num_nodes == 2048 else 0.005, rel=0)


def test_the_best_interval_is_youngs() -> None:
    """sqrt(2 · stall · time between failures), where recoveries are short."""
    p = with_best_interval(replace(QUICK, num_nodes=2048))
    young = (2 * p.checkpoint_stall_seconds / p.failures_per_second) ** 0.5
    assert p.checkpoint_every_seconds == pytest.approx(young, rel=0.05)


def test_llama3s_published_point_is_reproduced() -> None:
    """And follows from what an interruption costs on average, whatever that is made of."""
    assert LLAMA3_GOODPUT_ABOVE < llama3_goodput() < 0.95
    assert llama3_allowed_loss_seconds() == pytest.approx(1001, abs=1)
    assert pytest.approx(6.2, abs=0.05) == LLAMA3.step_seconds


def test_wrong_parameters_are_refused_by_name() -> None:
    for name, value in {"num_copies": 9, "step_seconds": 0.0, "detection_seconds": -1.0, "num_nodes": 0}.items():
        change: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=name):
            replace(PLAIN, **change)


RESULTS = {
    "num_nodes": 3,
    "step_seconds": 0.2,
    "kill_every_seconds": 10.0,
    "seconds_lost": {"median": 0.7, "low": 0.6, "high": 0.9},
    "parts": {"detection": 0.3, "regroup": 0.2, "transfer": 0.1},
    "goodput": 0.93,
}


def results(folder: Path, **changes: object) -> Path:
    path = folder / "recovery.json"
    path.write_text(json.dumps({**RESULTS, **changes}))
    return path


def test_calibration_predicts_the_benchs_own_run(tmp_path: Path) -> None:
    """0.6 s of parts and half a step, every 10 s."""
    found = calibrate(results(tmp_path))
    assert found.predicted_lost_seconds == pytest.approx(0.7, rel=0.02)
    assert found.predicted_goodput == pytest.approx(0.93, abs=0.002)
    assert found.predicted_low < found.predicted_goodput < found.predicted_high
    assert found.within


def test_calibration_says_what_does_not_fit(tmp_path: Path) -> None:
    assert not calibrate(results(tmp_path, parts={"detection": 0.1, "regroup": 0.2, "transfer": 0.1})).within
    assert not calibrate(results(tmp_path, goodput=0.6)).within
    assert calibrate(results(tmp_path, parts=None)).within
    nothing_else = calibrate(results(tmp_path, parts=None, goodput=None))
    assert (nothing_else.within, nothing_else.goodput_error) == (False, None)
    with pytest.raises(ValueError, match="seconds_lost"):
        calibrate(results(tmp_path, seconds_lost={"median": 1.0, "low": 2.0, "high": 3.0}))


def test_the_command_calibrates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--calibrate", str(results(tmp_path))])
    assert "within 10 %" in capsys.readouterr().out
    main(["--calibrate", str(results(tmp_path)), "--json"])
    assert json.loads(capsys.readouterr().out)["parameters"]["policy"] == Policy.SURVIVORS.value


def test_the_figure_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    points = [
        Point(scenario=scenario, num_nodes=count, checkpoint_every_seconds=1.0, simulated=0.5, estimated=0.5)
        for scenario in SCENARIOS
        for count in NODE_COUNTS
    ]
    for name in ("one.svg", "two.svg"):
        draw(points, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert set(COLOURS) == set(SCENARIOS)


def test_the_tables_name_every_scenario() -> None:
    point = Point(
        scenario="restart in minutes",
        num_nodes=LLAMA3_NODES,
        checkpoint_every_seconds=300,
        simulated=0.9,
        estimated=0.9,
    )
    found = {
        "llama3_goodput": 0.914,
        "llama3_allowed_loss_seconds": 1001.0,
        "llama3_sensitivity": [("detection_seconds", 1.0, 0.9)],
        "survivors_sensitivity": [],
        "points": [point],
    }
    text = as_markdown(found)
    assert all(scenario in text for scenario in SCENARIOS)
    assert "| `detection_seconds` | 1: 90.0% |" in text


def test_goodput_of_nothing_lost_is_all() -> None:
    assert Breakdown(productive=5).goodput == 1.0
