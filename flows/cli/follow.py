"""Follows a flow run of the pipeline from outside: its stages, the training's live line, and the end."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from flows.cli.output import LiveLine
from flows.deployments import deployment_of
from flows.publish import RUN_KEY_LABEL
from tasks.bookmark import find_bookmark
from tasks.follow import Follower, Progress
from tasks.results import PipelineResult
from tasks.stack import open_stack
from training.config import Preset
from training.documents import parse
from training.errors import CancelledError, InfrastructureError, UnbrokenError
from training.runs.record import RunRecord
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun, State

POLL_SECONDS = 0.5
UNCLAIMED_SECONDS = 20.0
RESUME_SECONDS = 60.0
RESULT_SECONDS = 60.0
AWAY_SECONDS = 300.0
"""Beside the minute that Prefect's client tries by itself."""


def follow_deployment(config: Preset, parameters: Mapping[str, Any], *, queue: str, quiet: bool) -> dict[str, Any]:
    """Start a flow run with these parameters and follow it to its end; Ctrl-C cancels it. Returns its result as JSON.

    Raises the error that the flow ended with, or `CancelledError`.
    """
    settings, store = open_stack()
    from httpx import HTTPError
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            run = _asked_again(lambda asked: _start(client, parameters, queue, asked))
            if not quiet:
                print(f"flow run {run.name}  {settings.prefect_ui_url}/runs/flow-run/{run.id}", flush=True)
            watcher = _Watcher(client, store, config, quiet=quiet)
            try:
                final = watcher.until_over(run.id)
            except KeyboardInterrupt:
                final = _cancel(client, watcher, run.id)
            return _conclude(final, quiet=quiet)
    except HTTPError as error:
        raise InfrastructureError(
            f"Prefect does not answer at {settings.prefect_api_url} ({error}): see `unbroken status`"
        ) from error


def _asked_again(start: Callable[[str], FlowRun]) -> FlowRun:
    """Until Prefect has taken it, or has been away for too long. Whatever of it arrived, it is one flow run: `start`
    names it by the text that it is given."""
    from httpx import ConnectError, HTTPError, HTTPStatusError

    asked, deadline = uuid4().hex, time.monotonic() + AWAY_SECONDS
    while True:
        try:
            return start(asked)
        except HTTPError as error:
            is_refused = isinstance(error, HTTPStatusError) and error.response.status_code < 500
            if is_refused or isinstance(error, ConnectError) or time.monotonic() > deadline:
                raise
            print(f"Prefect does not answer, and is asked again: {error}", file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)


def _start(client: SyncPrefectClient, parameters: Mapping[str, Any], queue: str, asked: str) -> FlowRun:
    deployment = deployment_of(client, parameters["preset"])
    mine = {name: value for name, value in os.environ.items() if name.startswith("UNBROKEN_S3_")}
    return client.create_flow_run_from_deployment(
        deployment.id,
        parameters=dict(parameters),
        idempotency_key=asked,
        work_queue_name=queue,
        job_variables={"env": mine} if mine else None,  # the flow looks where this command looks
    )


def _cancel(client: SyncPrefectClient, watcher: _Watcher, run_id: Any) -> FlowRun:
    print("\ncancelling …", file=sys.stderr, flush=True)
    ask_to_cancel(client, run_id)
    return watcher.until_over(run_id)


def ask_to_cancel(client: SyncPrefectClient, run_id: UUID) -> None:
    """Also one that is crashed: Prefect leaves that as it is, and the reaper would have it run again."""
    from prefect.states import Cancelling

    client.set_flow_run_state(run_id, Cancelling())
    state = client.read_flow_run(run_id).state
    if state is not None and state.is_crashed():
        client.set_flow_run_state(run_id, Cancelling(), force=True)


def _conclude(final: FlowRun, *, quiet: bool) -> dict[str, Any]:
    state = final.state
    assert state is not None
    if state.is_cancelled():
        raise CancelledError("the run was cancelled; no rank is left. The same command goes on where it stopped")
    outcome = outcome_of(state)
    if isinstance(outcome, UnbrokenError):
        raise outcome
    if not state.is_completed():
        raise InfrastructureError(f"the flow run ended {state.name}: {state.message}")
    result = parse(PipelineResult, outcome)  # Prefect gives a flow's result back as a plain document
    if not quiet:
        _print_result(result)
    return asdict(result)


def outcome_of(state: State[Any]) -> Any:
    """What the flow gave, or the error that it ended with.

    Raises `InfrastructureError` if the store stays away that holds it, or was away when it was to be kept.
    """
    deadline = time.monotonic() + RESULT_SECONDS
    while True:
        try:
            return state.result(raise_on_failure=False)
        except Exception as error:  # the storage's own, whichever it is
            if time.monotonic() > deadline:
                raise InfrastructureError(
                    f"the flow run ended {state.name} ({state.message}), and what it gave cannot be read: {error}."
                    " The same command finds what is done, and shows it"
                ) from error
            time.sleep(POLL_SECONDS)


def _print_result(result: PipelineResult) -> None:
    for name, estimate in result.evaluation.metrics.items():
        percent = f"{result.evaluation.confidence:.0%}"
        print(f"{name:14} {estimate.value:.4f}   {percent} interval {estimate.low:.4f} to {estimate.high:.4f}")
    version = result.registration
    print(f"model          {version.name} version {version.version} ({', '.join(version.aliases)})")
    print(f"run key        {version.run_key}")
    for name, url in result.links.items():
        print(f"{name:14} {url}")


class _Watcher:
    """Shows a flow run's stages as they end, and the training's progress between."""

    def __init__(self, client: SyncPrefectClient, store: Store, config: Preset, *, quiet: bool) -> None:
        self._client = client
        self._store = store
        self._config = config
        self._quiet = quiet
        self._live = LiveLine()
        self._shown: set[str] = set()
        self._is_trained = False
        self._started = time.monotonic()
        self._run_key = ""
        self._maybe_follower: Follower | None = None
        self._maybe_crash: tuple[UUID, float] | None = None
        self._maybe_away_since: float | None = None

    def until_over(self, run_id: Any) -> FlowRun:
        while True:
            with self._patience():
                run = self._client.read_flow_run(run_id)
                if not self._quiet:
                    self._show_stages(run_id)
                    self._show_training(run)
                if run.state is not None and run.state.is_final() and not self._may_be_resumed(run):
                    self._live.end()
                    return run
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _patience(self) -> Iterator[None]:
        """Prefect may be away: the run does not need us to look. Raises httpx's error if it stays away."""
        from httpx import HTTPError

        try:
            yield
            self._maybe_away_since = None
        except HTTPError as error:
            now = time.monotonic()
            self._maybe_crash = None
            self._maybe_away_since = self._maybe_away_since or now
            if now - self._maybe_away_since > AWAY_SECONDS:
                raise
            if not self._quiet:
                self._live.show(f"Prefect does not answer, and the run goes on: {error}")

    def _may_be_resumed(self, run: FlowRun) -> bool:
        """A crash is for the reaper to mend; what it leaves crashed for long has ended.

        Another crash, or a server that was away, begins another wait.
        """
        assert run.state is not None
        if not run.state.is_crashed():
            return False
        now = time.monotonic()
        if self._maybe_crash is None or self._maybe_crash[0] != run.state.id:
            self._maybe_crash = (run.state.id, now)
            if not self._quiet:
                self._live.end(f"crashed: {run.state.message}")
        return now - self._maybe_crash[1] < RESUME_SECONDS

    def _show_stages(self, run_id: Any) -> None:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        ours = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        tasks = self._client.read_task_runs(flow_run_filter=ours)
        for task in sorted(tasks, key=lambda task: str(task.end_time)):
            if task.name.startswith("shard-part"):
                continue  # there may be thousands
            if task.state is not None and task.state.is_final() and task.name not in self._shown:
                self._shown.add(task.name)
                self._is_trained |= task.name.startswith("train") and task.state.is_completed()
                seconds = task.total_run_time.total_seconds()
                self._live.end(f"{task.name.rpartition('-')[0]:10} {task.state.name:10} {seconds:6.1f} s")

    def _waiting_line(self, run: FlowRun) -> str:
        state = run.state.name if run.state is not None else "Waiting"
        if run.start_time is None and time.monotonic() - self._started > UNCLAIMED_SECONDS:
            return f"{state} …  no worker has taken it yet: see `unbroken status`"
        return f"{state} …"

    def _show_training(self, run: FlowRun) -> None:
        key = (run.labels or {}).get(RUN_KEY_LABEL)
        if self._is_trained:
            return
        if key is None or run.state is None or run.state.is_final():
            self._live.show(self._waiting_line(run))
            return
        try:
            progress = self._look(RunRecord(self._store, str(key)))
        except InfrastructureError:  # not begun yet, or storage is away: the run does not need us to look
            return
        self._live.show(progress.line() if progress else self._waiting_line(run))

    def _look(self, run: RunRecord) -> Progress | None:
        """The training's progress; None while the run is finished, be it that `--fresh` is about to begin it anew."""
        record = run.read()
        if self._run_key != run.run_key:  # in quarantine there may be several, one after another
            self._run_key, self._maybe_follower = run.run_key, None
            self._live.end(f"run key    {run.run_key}")
        if self._maybe_follower is None or self._maybe_follower.generation != record.generation:
            self._maybe_follower = Follower(
                run,
                generation=record.generation,
                num_steps=self._config.train.steps,
                bookmark=find_bookmark(self._store, record, told_step=math.inf),  # it tells MLflow nothing
            )
        if record.result is not None:
            return None
        self._maybe_follower.look()
        return self._maybe_follower.progress
