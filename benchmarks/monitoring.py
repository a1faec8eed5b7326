"""`python -m benchmarks.monitoring`: what watching a run takes from its step rate.

On the local stack, which must be up with Prometheus and Alertmanager. In one run, phases in which they and the monitor
work alternate with phases in which all three are stopped (SIGSTOP).
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import sys
import time
import timeit
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelling

from infra.local import supervisor
from tasks.stack import open_stack
from training.runs.figures import Figures
from training.runs.history import events_of
from training.runs.record import RunRecord
from training.s3.objectstore import Store

WATCHERS = ("monitor", "prometheus", "alertmanager")
STEPS = 3_000_000
"""More than are made before it is cancelled."""
FLUSH_SECONDS = 3.0
"""Until all that happened has been told."""
SETTLING_SECONDS = 10.0
RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the run, in seconds since the epoch."""

    begun: float
    ended: float
    is_watched: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """Ratios are steps per second watched over unwatched, of each pair of phases."""

    ratios: Sequence[float]
    steps_per_second: float
    watchers_cpu: Mapping[str, float]
    """Shares of one processor, while they work."""
    counting_seconds: float
    """Of a step: what a rank adds to its figures, watched or not."""


def measure(client: SyncPrefectClient, store: Store, *, pairs: int, phase_seconds: float) -> Found:
    settings, _ = open_stack()
    server = supervisor.remote(settings.home)
    watchers = {name: psutil.Process(server.getProcessInfo(name)["pid"]) for name in WATCHERS}
    deployment = client.read_deployment_by_name("pipeline/digits")
    mark = uuid.uuid4().int % 1_000_000
    overrides = {"train.steps": STEPS, "seed": mark}
    asked = client.create_flow_run_from_deployment(
        deployment.id, parameters={"preset": "digits", "overrides": overrides}
    )
    run = _wait_for_steps(client, store, asked.id)
    time.sleep(SETTLING_SECONDS)
    before = {name: _cpu_seconds(process) for name, process in watchers.items()}
    phases: list[Phase] = []
    try:
        for _ in range(pairs):
            for is_watched in random.sample((True, False), 2):
                _let(watchers.values(), work=is_watched)
                begun = time.time()
                time.sleep(phase_seconds)
                phases.append(Phase(begun=begun, ended=time.time(), is_watched=is_watched))
    finally:
        _let(watchers.values(), work=True)
    watched_seconds = sum(phase.ended - phase.begun for phase in phases if phase.is_watched)
    cpu = {name: (_cpu_seconds(process) - before[name]) / watched_seconds for name, process in watchers.items()}
    time.sleep(FLUSH_SECONDS)
    times = sorted(event.time for event in events_of(run, run.read()) if event.kind == "step")
    client.set_flow_run_state(asked.id, Cancelling())
    rates = [sum(phase.begun <= at < phase.ended for at in times) / (phase.ended - phase.begun) for phase in phases]
    by_pair = [
        dict(zip((one.is_watched for one in phases[at : at + 2]), rates[at : at + 2], strict=True))
        for at in range(0, len(phases), 2)
    ]
    return Found(
        ratios=[pair[True] / pair[False] for pair in by_pair],
        steps_per_second=statistics.median(rates),
        watchers_cpu=cpu,
        counting_seconds=_counting_seconds(),
    )


def _wait_for_steps(client: SyncPrefectClient, store: Store, flow_run: uuid.UUID) -> RunRecord:
    """The run, once it makes steps."""
    while True:
        time.sleep(0.5)
        state = client.read_flow_run(flow_run)
        assert state.state is not None
        assert not state.state.is_final(), state.state
        key = state.labels.get("unbroken.run_key")
        if key is None:
            continue
        run = RunRecord(store, str(key))
        record = run.find()
        if record is not None and any(event.kind == "step" for event in events_of(run, record)):
            return run


def _let(watchers: Iterable[psutil.Process], *, work: bool) -> None:
    for process in watchers:
        process.send_signal(signal.SIGCONT if work else signal.SIGSTOP)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _counting_seconds() -> float:
    figures = Figures()

    def count() -> None:
        figures.steps += 1
        figures.samples += 4.0
        figures.loss = 0.5
        figures.outside_seconds += 0.001
        figures.pace_seconds += 0.001
        figures.collective_seconds += 0.001
        figures.data_wait_seconds += 0.001

    return min(timeit.repeat(count, number=10_000, repeat=5)) / 10_000


def interval(ratios: Sequence[float], *, share: float = 0.95) -> tuple[float, float]:
    """Of the median, by the bootstrap (Efron 1979)."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    cut = round(RESAMPLES * (1 - share) / 2)
    return medians[cut], medians[-cut - 1]


def as_markdown(found: Found) -> str:
    low, high = interval(found.ratios)
    step = 1 / found.steps_per_second
    lines = [
        "| | |",
        "| --- | --- |",
        f"| step rate watched / unwatched, median of {len(found.ratios)} pairs (95 %) "
        f"| {statistics.median(found.ratios):.4f} ({low:.4f}–{high:.4f}) |",
        f"| steps per second | {found.steps_per_second:.0f} |",
        *(f"| {name}, of one processor | {share:.2%} |" for name, share in found.watchers_cpu.items()),
        f"| what a rank counts in a step, watched or not "
        f"| {1e6 * found.counting_seconds:.2f} µs, {found.counting_seconds / step:.3%} of a step |",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitoring", description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--phase-seconds", type=float, default=10.0, help="at least two looks of windows.toml")
    options = parser.parse_args(arguments)
    settings, store = open_stack()
    with SyncPrefectClient(settings.prefect_api_url) as client:
        found = measure(client, store, pairs=options.pairs, phase_seconds=options.phase_seconds)
    print(f"ratios {[round(ratio, 4) for ratio in found.ratios]}", file=sys.stderr)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
