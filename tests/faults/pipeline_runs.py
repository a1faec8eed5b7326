"""One pipeline run as it is seen from outside: how far it is, and what is left of it at its end, wherever it shows."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from infra.local import supervisor
from infra.local.launcher import LocalLauncher
from infra.local.watch import infos
from tasks.mlflow_client import RUN_KEY_TAG, connect
from tasks.tracking import METRICS
from tests.conftest import Stack
from tests.flows.runs import mlflow_runs, run_keys
from tests.waiting import wait_until
from training.errors import InfrastructureError
from training.runs.events import Event
from training.runs.history import events_of
from training.runs.record import Record, RunRecord

STAGES = ("shard", "train", "evaluate", "register")
MOMENTS = ("asked for", "sharded", "training", "trained")


@dataclass
class PipelineRun:
    """The flow run of a dataset that no other run has."""

    stack: Stack
    dataset: str
    known_keys: frozenset[str]
    """Of the runs before."""
    _was_asked_for: bool = False

    def has_come_to(self, moment: str) -> bool:
        """Whether it is that far; False also while the store cannot say."""
        with contextlib.suppress(InfrastructureError):
            match moment:
                case "asked for":
                    return self._is_asked_for()
                case "sharded":
                    return any(True for _ in self.stack.store.list_keys(f"datasets/{self.dataset}/shards/"))
                case "training":
                    return bool(self.record().attempt_starts)
                case "trained":
                    return self.record().result is not None
        return False

    def _is_asked_for(self) -> bool:
        """Asked of Prefect until it says so: later it may be away."""
        self._was_asked_for = self._was_asked_for or self._state() is not None
        return self._was_asked_for

    @property
    def run(self) -> RunRecord:
        """Raises `InfrastructureError` as long as there is none."""
        new = run_keys(self.stack) - self.known_keys
        if not new:
            raise InfrastructureError("it has not begun yet")
        (key,) = new
        return RunRecord(self.stack.store, key)

    def record(self) -> Record:
        return self.run.read()

    # ---- Prefect -------------------------------------------------------------------------------------------------

    def wait_until_completed(self, *, timeout_seconds: float) -> None:
        """Whoever ends otherwise, and is left so, is waited for in vain."""
        what = f"flow run on {self.dataset} to be completed"
        wait_until(lambda: self._state() == "Completed", what=what, timeout_seconds=timeout_seconds)

    def _state(self) -> str | None:
        with contextlib.suppress(httpx.HTTPError), self._client() as client:
            found = self._flow_run(client)
            return found.state.name if found is not None and found.state is not None else None
        return None

    def states(self) -> list[str | None]:
        """Every state that it had, oldest first."""
        with self._client() as client:
            return [state.name for state in client.read_flow_run_states(self._flow_run(client).id)]

    def task_states(self, stage: str) -> list[str]:
        """How each task run of a stage ended."""
        with self._client() as client:
            ours = FlowRunFilter(id=FlowRunFilterId(any_=[self._flow_run(client).id]))
            tasks = client.read_task_runs(flow_run_filter=ours)
        return [task.state.name for task in tasks if task.name.rpartition("-")[0] == stage and task.state is not None]

    def _flow_run(self, client: SyncPrefectClient) -> Any:
        name = f"data.name={self.dataset}"
        ours = [
            run
            for run in client.read_flow_runs()
            if (run.parameters.get("overrides") or {}).get("data.name") == self.dataset
        ]
        assert len(ours) <= 1, f"{len(ours)} flow runs of {name}"
        return ours[0] if ours else None

    def _client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.stack.settings.prefect_api_url)

    # ---- what is left of it --------------------------------------------------------------------------------------

    def leftovers(self) -> list[str]:
        """Processes that no supervisor started for a service, and jobs of the engine."""
        head = supervisor.supervisor_process(self.stack.home)
        if head is None or not supervisor.is_running(self.stack.home):
            return ["no supervisor"]
        services = {info["pid"] for info in infos(self.stack.home).values()}
        left = [f"job {key}" for key in LocalLauncher(self.stack.home).jobs()]
        for process in supervisor.stack_processes(self.stack.home):
            with contextlib.suppress(psutil.NoSuchProcess):
                ancestors = {process.pid, *(parent.pid for parent in process.parents())}
                is_working = any("prefect.engine" in part or part.startswith("training.") for part in process.cmdline())
                if is_working or not (head.pid in ancestors and ancestors & services):
                    left.append(" ".join(process.cmdline()))
        return left

    def require_told_once(self, num_steps: int) -> None:
        """One MLflow run, finished, with one point per metric and step; and one model version, of its weights."""
        key = self.run.run_key
        wait_until(
            lambda: [run.info.status for run in mlflow_runs(self.stack, key)] == ["FINISHED"],
            what="one MLflow run, finished",
        )
        (tracked,) = mlflow_runs(self.stack, key)
        client = connect(self.stack.settings.mlflow_uri)
        for name in tracked.data.metrics:
            steps = [point.step for point in client.get_metric_history(tracked.info.run_id, name)]
            assert len(steps) == len(set(steps)), f"{name} has several points of a step"
            if name in METRICS:
                assert sorted(steps) == list(range(1, num_steps + 1)), name
        assert set(METRICS) < set(tracked.data.metrics)
        assert any(name.startswith("test.") for name in tracked.data.metrics)
        versions = client.search_model_versions(f"tags.`{RUN_KEY_TAG}` = '{key}'")
        assert len(versions) == 1, f"{len(versions)} model versions"

    def done_again(self, num_steps: int) -> dict[str, int]:
        """What was done of a stage after it had finished, by the objects on S3 and by Prefect's task runs."""
        record = self.record()
        store, run = self.stack.store, self.run
        manifests = [entry.modified for entry in store.list_entries(f"datasets/{self.dataset}/manifests/")]
        shards = [entry.modified for entry in store.list_entries(f"datasets/{self.dataset}/shards/")]
        events = list(events_of(run, record))
        assert record.result is not None
        end = _time_of_result(events, record)
        return {
            "manifests": len(manifests) - 1,
            "shards_put_after_the_manifest": sum(shard > min(manifests) for shard in shards),
            "steps_after_the_result": sum(event.kind == "step" and event.time > end for event in events),
            "generations": record.generation,
            **{f"{stage}_completed_again": max(0, self.task_states(stage).count("Completed") - 1) for stage in STAGES},
        }


def _time_of_result(events: list[Event], record: Record) -> float:
    """When the checkpoint that the result is was proven, for the first time."""
    assert record.result is not None
    return min(event.time for event in events if event.kind == "checkpoint" and event.step == record.result.step)
