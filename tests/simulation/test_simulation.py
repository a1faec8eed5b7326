"""The membership protocol holds in simulated schedules with faults; and the simulation would notice if it did not."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from tests.faults.evidence import write_evidence
from tests.simulation.compiled import compile_in, first_fingerprints, run_in
from tests.simulation.faults import STATES, STRIKES
from tests.simulation.many import missing, tell
from tests.simulation.planted import PLANTED, Planted, find, planted
from tests.simulation.runner import Summary, run_many, shrink, simulate

NUM_SEEDS = 2300
NUM_SOAK_SEEDS = 1_030_000
"""A few of them give schedules that others gave already."""
SURVIVORS = {
    "a checkpoint is named under any token": "retention, in the same change of the record, checks the token too",
    "a group that is reached is taken over": "it leaves signs of life, too; tests/unit/test_node.py has the case",
    "time asleep counts": "seldom seen, as records change often; tests/unit/test_node.py has the case",
    "a member that never comes is waited for": "the workers' own time limit ends such a group too",
}
"""Planted bugs that a few hundred schedules do not bring to light, and why."""


@pytest.fixture(scope="module")
def summary() -> Summary:
    return run_many(range(NUM_SEEDS))


def test_invariants_hold_in_a_fixed_share_of_schedules(summary: Summary) -> None:
    print(tell(summary, seconds=1.0))
    assert not summary.broken
    assert len(summary.fingerprints) > 0.98 * NUM_SEEDS
    assert median(summary.num_events) >= 50
    assert summary.num_fenced > 0, "no zombie ever tried to commit"
    assert len(missing(summary)) < 0.2 * len(STATES) * len(STRIKES)
    assert {"result", "failure", "anew"} <= summary.outcomes.keys()


def test_every_fault_strikes(summary: Summary) -> None:
    assert {name for _, name in summary.struck} == set(STRIKES)


@pytest.mark.parametrize("seed", [3, 1206])
def test_a_seed_gives_one_schedule(seed: int) -> None:
    first, second = simulate(seed, tracing=True), simulate(seed, tracing=True)
    assert first.lines == second.lines
    assert first.fingerprint == second.fingerprint == simulate(seed).fingerprint
    assert first.fingerprint != simulate(seed + 1).fingerprint


def test_a_broken_schedule_is_shrunk_to_the_faults_that_matter() -> None:
    bug = next(bug for bug in PLANTED if bug.name == "the token is not checked")
    with planted(bug):
        traces = (simulate(seed) for seed in range(2000))
        trace = next(trace for trace in traces if trace.maybe_violation and len(trace.faults) > 2)
        shrunk = shrink(trace)
        assert shrunk.maybe_violation is not None
        assert trace.maybe_violation is not None
        assert shrunk.maybe_violation.rule == trace.maybe_violation.rule
        assert len(shrunk.faults) < len(trace.faults)
        assert "BROKEN" in shrunk.lines[-1]
    assert simulate(trace.seed).maybe_violation is None


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_planted_bugs_are_caught(bug: Planted) -> None:
    if bug.name in SURVIVORS:
        with planted(bug):  # it still applies
            return
    assert find(bug, seeds=range(bug.first_seed, bug.first_seed + 400)), f"{bug.name} survived"


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_a_million_schedules(tmp_path: Path) -> None:
    """Half an hour on two cores, compiled."""
    compile_in(tmp_path)
    found = run_in(tmp_path, NUM_SOAK_SEEDS)
    assert found["node"].endswith(".so")
    assert found["first_fingerprints"] == first_fingerprints(), "compiled code does something else"
    schedules, pairs = found["rows"]
    caught = {bug.name: find(bug, seeds=range(bug.first_seed, bug.first_seed + 2000)) for bug in PLANTED}
    write_evidence(
        "simulated-schedules",
        rows=[
            {**schedules, "compiled_by": "mypyc"},
            pairs,
            {
                "planted_bugs": len(PLANTED),
                "caught_by_seed": {name: trace.seed for name, trace in caught.items() if trace is not None},
                "survived": {name: SURVIVORS.get(name, "") for name, trace in caught.items() if trace is None},
            },
        ],
    )
    assert not schedules["broken"]
    assert schedules["distinct"] >= 1_000_000
    assert {name for name, trace in caught.items() if trace is None} <= SURVIVORS.keys()
