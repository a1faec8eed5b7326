"""Prefect's flow runs: which of them somebody still executes, and how they are set right."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil

from flows.publish import MACHINE_LABEL, machine_label
from flows.reaper.decide import MAX_CRASHES_IN_AN_HOUR, FlowSight, FlowVerdict, judge_flow
from flows.reaper.signs import Signs
from infra.launcher import Launcher, cancel_owned_by
from infra.local.services import WORK_POOL
from training.documents import read_document
from training.errors import DamagedError, InfrastructureError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas import OrchestrationResult
    from prefect.client.schemas.objects import FlowRun, State

log = logging.getLogger(__name__)

FLOWS = ("pipeline", "predict")
FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
OPEN_STATES = ("RUNNING", "PENDING", "CANCELLING")
CRASHES_TO_LOOK_AT = timedelta(days=1)
"""Older ones were there before the reaper, or nobody waits for them any more."""
NUM_AT_ONCE = 200


class FlowRuns:
    """Those of the work pool whose workers run here."""

    def __init__(self, client: SyncPrefectClient, launcher: Launcher) -> None:
        self._client = client
        self._launcher = launcher
        self._signs = Signs()
        self._processes: dict[str, psutil.Process] = {}
        self._looks = itertools.count()

    def set_right(self, *, now: float) -> None:
        """One look at each flow run that is open, and what follows from it. `now` is a monotonic clock's."""
        runs = self._open_and_crashed()
        self._find_processes(str(run.id) for run in runs)
        self._signs.begin_look({(str(run.id), what) for run in runs for what in ("state", "life")}, now=now)
        for run in runs:
            self._act(run, judge_flow(self._sight(run, now)))

    def states(self, ids: Iterable[str]) -> Mapping[str, str]:
        """The state type of each flow run that Prefect knows; of one that crashed and is to be resumed, SCHEDULED."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        known = [UUID(text) for text in ids]
        if not known:
            return {}
        found = self._client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=known)))
        return {str(run.id): "SCHEDULED" if self._is_to_be_resumed(run) else _state_type(run) for run in found}

    def _is_to_be_resumed(self, run: FlowRun) -> bool:
        if _state_type(run) != "CRASHED" or run.end_time is None:
            return False
        is_recent = run.end_time > datetime.now(UTC) - CRASHES_TO_LOOK_AT
        return is_recent and self._num_crashes(run) <= MAX_CRASHES_IN_AN_HOUR

    def _open_and_crashed(self) -> list[FlowRun]:
        from prefect.client.schemas import filters
        from prefect.client.schemas.objects import StateType
        from prefect.types import DateTime

        def of(*types: str) -> filters.FlowRunFilterState:
            wanted = filters.FlowRunFilterStateType(any_=[StateType(name) for name in types])
            return filters.FlowRunFilterState(type=wanted)

        lately = filters.FlowRunFilterEndTime(after_=DateTime.now(UTC) - CRASHES_TO_LOOK_AT)
        wanted = (
            filters.FlowRunFilter(state=of(*OPEN_STATES)),
            filters.FlowRunFilter(state=of("CRASHED"), end_time=lately),
        )
        pool = filters.WorkPoolFilter(name=filters.WorkPoolFilterName(any_=[WORK_POOL]))
        flow = filters.FlowFilter(name=filters.FlowFilterName(any_=[*FLOWS]))  # others' are theirs to resume
        return [
            run
            for kind in wanted
            for run in self._client.read_flow_runs(
                flow_filter=flow, flow_run_filter=kind, work_pool_filter=pool, limit=NUM_AT_ONCE
            )
            if run.deployment_id is not None
        ]

    def _sight(self, run: FlowRun, now: float) -> FlowSight:
        key, state = str(run.id), _state_type(run)
        is_here = self._is_here(key)
        says_so = state == "RUNNING" and (run.labels or {}).get(MACHINE_LABEL) == machine_label(run.run_count)
        was_here = key in self._processes or says_so
        life = (
            run.state_id,
            next(self._looks) if is_here else None,
            self._heartbeat(run) if state == "RUNNING" and not was_here else None,
        )
        return FlowSight(
            state=state,
            seconds_in_state=self._signs.seconds_unchanged((key, "state"), run.state_id, now=now),
            is_here=is_here,
            was_here=was_here,
            silent_seconds=self._signs.seconds_unchanged((key, "life"), life, now=now),
            num_crashes=self._num_crashes(run) if state == "CRASHED" else 0,
        )

    def _heartbeat(self, run: FlowRun) -> str | None:
        """The newest one's id."""
        asked = {
            "filter": {
                "event": {"name": ["prefect.flow-run.heartbeat"]},
                "resource": {"id": [f"prefect.flow-run.{run.id}"]},
            },
            "limit": 1,
        }
        return newest_event(self._client.request("POST", "/events/filter", json=asked).content)

    def _num_crashes(self, run: FlowRun) -> int:
        since = datetime.now(UTC) - timedelta(hours=1)
        states = self._client.read_flow_run_states(run.id)
        return sum(state.type.value == "CRASHED" and state.timestamp > since for state in states)

    # ---- processes -----------------------------------------------------------------------------------------------

    def _find_processes(self, ids: Iterable[str]) -> None:
        """Those that were seen are remembered while their flow run is open, be they dead."""
        wanted = set(ids)
        self._processes = {key: process for key, process in self._processes.items() if key in wanted}
        if all(self._is_here(key) for key in wanted):
            return
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                key = process.environ().get(FLOW_RUN_VARIABLE)
                if key in wanted and "prefect.engine" in process.cmdline():
                    self._processes[key] = process

    def _is_here(self, key: str) -> bool:
        process = self._processes.get(key)
        if process is None:
            return False
        with contextlib.suppress(psutil.Error):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    # ---- what is done --------------------------------------------------------------------------------------------

    def _act(self, run: FlowRun, verdict: FlowVerdict) -> None:
        match verdict:
            case FlowVerdict.RESUME:
                self._resume(run)
            case FlowVerdict.RESTORE:
                self._restore(run)
            case FlowVerdict.CANCEL_JOBS:
                self._cancel_jobs(run)
            case FlowVerdict.END:
                self._end(run)

    def _resume(self, run: FlowRun) -> None:
        from prefect.client.schemas.responses import SetStateStatus
        from prefect.states import AwaitingRetry, Crashed

        why = "The process that executed it is gone."
        if _state_type(run) != "CRASHED":
            told: OrchestrationResult[Any] = self._client.set_flow_run_state(run.id, Crashed(message=why))
            if told.status is not SetStateStatus.ACCEPT:  # it has ended by itself meanwhile
                return
        self._crash_tasks(run, why)
        again: State[Any] = AwaitingRetry(
            scheduled_time=datetime.now(UTC), message="Resumed by the reaper after a crash."
        )
        self._processes.pop(str(run.id), None)  # the next one, perhaps elsewhere, may take its time to begin
        self._client.set_flow_run_state(run.id, again)
        log.info("flow run %s crashed: resumed", run.name)

    def _restore(self, run: FlowRun) -> None:
        from prefect.states import Running

        alive: State[Any] = Running(message="Its process lives.")
        self._client.set_flow_run_state(run.id, alive, force=True)
        log.info("flow run %s was called crashed, and its process lives: running", run.name)

    def _crash_tasks(self, run: FlowRun, why: str) -> None:
        """The task runs that its process left behind as running."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
        from prefect.states import Crashed

        ours = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        for task in self._client.read_task_runs(flow_run_filter=ours):
            if task.state is not None and not task.state.is_final():
                self._client.set_task_run_state(task.id, Crashed(message=why), force=True)

    def _cancel_jobs(self, run: FlowRun) -> None:
        for key in cancel_owned_by(self._launcher, str(run.id)):
            log.info("flow run %s is being cancelled: ended job %s", run.name, key[:12])

    def _end(self, run: FlowRun) -> None:
        from prefect.states import Cancelled

        process = self._processes.get(str(run.id))
        if process is not None:
            for each in (process, *_children(process)):
                with contextlib.suppress(psutil.Error):
                    each.kill()
        self._cancel_jobs(run)
        self._client.set_flow_run_state(run.id, Cancelled(message="Cancelled by the reaper: nobody else was left to."))
        log.info("flow run %s is cancelled", run.name)


def newest_event(answer: bytes) -> str | None:
    """The id of the first of the events that Prefect tells of. Raises `InfrastructureError` if it tells of none."""
    try:
        events = read_document(answer, what="Prefect's list of events")["events"]
        return str(events[0]["id"]) if events else None
    except (DamagedError, KeyError, TypeError) as error:
        raise InfrastructureError(f"Prefect does not answer as it should: {error!r}") from error


def _children(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return list(process.children(recursive=True))
    return []


def _state_type(run: FlowRun) -> str:
    return run.state_type.value if run.state_type is not None else "SCHEDULED"
