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
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
    others_cpu: Mapping[str, float]
    """Likewise, what each other program takes more of while it is watched than while it is not."""
    counting_seconds: float
    """Of a step: what a rank adds to its figures, watched or not."""


def measure(client: SyncPrefectClient, store: Store, *, preset: str, pairs: int, phase_seconds: float) -> Found:
    settings, _ = open_stack()
    server = supervisor.remote(settings.home)
    watchers = {name: psutil.Process(server.getProcessInfo(name)["pid"]) for name in WATCHERS}
    deployment = client.read_deployment_by_name(f"pipeline/{preset}")
    mark = uuid.uuid4().int % 1_000_000
    overrides = {"train.steps": STEPS, "seed": mark}
    asked = client.create_flow_run_from_deployment(deployment.id, parameters={"preset": preset, "overrides": overrides})
    run = _wait_for_steps(client, store, asked.id)
    time.sleep(SETTLING_SECONDS)
    before = {name: _cpu_seconds(process) for name, process in watchers.items()}
    phases: list[Phase] = []
    others = Meter(settings.home)
    try:
        for _ in range(pairs):
            for is_watched in random.sample((True, False), 2):
                _let(watchers.values(), work=is_watched)
                begun = time.time()
                others.read()
                time.sleep(phase_seconds)
                phases.append(Phase(begun=begun, ended=time.time(), is_watched=is_watched))
                others.note(is_watched=is_watched)
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
        others_cpu=others.differences(watched_seconds),
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


class Meter:
    """Adds up the processor time of the stack's programs, the watchers left out."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._before: dict[psutil.Process, float] = {}
        self._seconds: dict[bool, dict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}

    def read(self) -> None:
        self._before = self._now()

    def note(self, *, is_watched: bool) -> None:
        """What was taken since `read`. A process that has ended since is not in it."""
        for process, seconds in self._now().items():
            with suppress(psutil.Error):
                self._seconds[is_watched][_program(process)] += seconds - self._before.get(process, 0.0)

    def _now(self) -> dict[psutil.Process, float]:
        found = {}
        for process in supervisor.stack_processes(self._home):
            with suppress(psutil.Error):
                found[process] = _cpu_seconds(process)
        return found

    def differences(self, seconds: float) -> dict[str, float]:
        """As shares of one processor; `seconds` are those of all watched phases, and of all others."""
        watched, unwatched = self._seconds[True], self._seconds[False]
        found = {name: (watched[name] - unwatched[name]) / seconds for name in [*watched, *unwatched]}
        return {name: share for name, share in found.items() if name not in WATCHERS}


def _program(process: psutil.Process) -> str:
    """The service that it belongs to, or its module where it is one of a flow's."""
    service = process.environ().get("SUPERVISOR_PROCESS_NAME", "")
    command = process.cmdline()
    if service.startswith("worker") and "-m" in command[:-1]:
        return command[command.index("-m") + 1]
    return service


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
        *(
            f"| {name}, more while watched | {share:+.2%} |"
            for name, share in sorted(found.others_cpu.items(), key=lambda other: -other[1])
        ),
        f"| what a rank counts in a step, watched or not "
        f"| {1e6 * found.counting_seconds:.2f} µs, {found.counting_seconds / step:.3%} of a step |",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitoring", description=__doc__)
    parser.add_argument("--preset", default="digits", help="whose deployment trains")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--phase-seconds", type=float, default=10.0, help="at least two looks of windows.toml")
    options = parser.parse_args(arguments)
    settings, store = open_stack()
    with SyncPrefectClient(settings.prefect_api_url) as client:
        found = measure(client, store, preset=options.preset, pairs=options.pairs, phase_seconds=options.phase_seconds)
    print(f"ratios {[round(ratio, 4) for ratio in found.ratios]}", file=sys.stderr)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
