"""`python -m benchmarks.orchestration`: where the time of a pipeline run goes, from asking for it to its end.

On the local stack, which must be up. What is not steps is what the chain costs, whatever a training takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from infra.local import supervisor
from tasks.stack import open_stack
from training.runs.history import committed_steps, events_of
from training.runs.record import RunRecord
from training.s3.objectstore import Store

PARTS = (
    "worker takes the flow run",
    "worker starts a process",
    "Python and Prefect are imported",
    "flow begins, records are counted",
    "shard stage",
    "run is opened, job is submitted, agents start, ranks meet",
    "ranks are ready, first step",
    "steps",
    "end is noticed, MLflow is told",
    "evaluate stage",
    "register stage",
    "results are published",
)
FIRST_STEP = PARTS.index("steps")
LONG_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run: when each part ended (seconds since the epoch), and what its steps took."""

    begun: float
    ends: Mapping[str, float]
    num_steps: int

    def seconds(self) -> dict[str, float]:
        """Of each part."""
        found, last = {}, self.begun
        for part in PARTS:
            found[part] = self.ends[part] - last
            last = self.ends[part]
        return found


def measure(client: SyncPrefectClient, store: Store, preset: str, steps: int) -> Measured:
    """One run that no run before has done anything of."""
    mark = uuid.uuid4().int % 1_000_000
    overrides = {"train.steps": steps, "seed": mark, "data.name": f"orchestration-{mark}"}
    deployment = client.read_deployment_by_name(f"pipeline/{preset}")
    begun = time.time()
    asked = client.create_flow_run_from_deployment(deployment.id, parameters={"preset": preset, "overrides": overrides})
    process_begun = 0.0
    while not (run := client.read_flow_run(asked.id)).state.is_final():  # type: ignore[union-attr]
        process_begun = process_begun or _process_begun(str(run.id))
        time.sleep(0.1)
    assert run.state is not None
    assert run.state.is_completed(), run.state
    states = {state.name: state.timestamp.timestamp() for state in client.read_flow_run_states(run.id)}
    ours = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    tasks = {task.name.rpartition("-")[0]: task for task in client.read_task_runs(flow_run_filter=ours)}
    record_of = RunRecord(store, str(run.labels["unbroken.run_key"]))
    record = record_of.read()
    counted = committed_steps(record_of, record)
    met = next(event.time for event in events_of(record_of, record) if event.kind == "attempt")

    def start(stage: str) -> float:
        return float(tasks[stage].start_time.timestamp())  # type: ignore[union-attr]

    def end(stage: str) -> float:
        return float(tasks[stage].end_time.timestamp())  # type: ignore[union-attr]

    ends = (
        *(states["Pending"], process_begun, states["Running"], start("shard"), end("shard"), met),
        *(counted[0].time, counted[-1].time, end("train"), end("evaluate"), end("register"), states["Completed"]),
    )
    return Measured(begun=begun, ends=dict(zip(PARTS, ends, strict=True)), num_steps=len(counted))


def _process_begun(run_id: str) -> float:
    """When the flow run's process was started; 0 as long as there is none."""
    settings, _ = open_stack()
    for process in supervisor.stack_processes(settings.home):
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run_id:
                return float(process.create_time())
        except psutil.NoSuchProcess:
            continue
    return 0.0


def as_markdown(found: Sequence[Measured]) -> str:
    """Seconds by part: median (min–max); then what the chain costs."""
    lines = ["| part | seconds |", "| --- | --- |"]
    by_part = {part: [one.seconds()[part] for one in found] for part in PARTS}
    lines += [f"| {part} | {_cell(values)} |" for part, values in by_part.items()]
    until_step = [sum(one.seconds()[part] for part in PARTS[:FIRST_STEP]) for one in found]
    fixed = [sum(seconds for part, seconds in one.seconds().items() if part != "steps") for one in found]
    lines.append(f"| **from asking to the first step** | {_cell(until_step)} |")
    lines.append(f"| **all but steps** | {_cell(fixed)} |")
    share = statistics.median(fixed) / LONG_SECONDS
    return "\n".join(lines) + f"\n\nOf a run that takes {LONG_SECONDS:.0f} s in all: {share:.1%}.\n"


def _cell(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    settings, store = open_stack()
    found: list[Measured] = []
    with SyncPrefectClient(settings.prefect_api_url) as client:
        for number in range(options.rounds):
            found.append(measure(client, store, options.preset, options.steps))
            told: Any = {part: round(seconds, 2) for part, seconds in found[-1].seconds().items()}
            print(f"round {number + 1}: {told}", file=sys.stderr, flush=True)
    print(as_markdown(found))


if __name__ == "__main__":
    main()
