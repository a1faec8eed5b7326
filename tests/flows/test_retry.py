"""Storage that is away for long: the ranks train on, and whoever follows them follows on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId, LogFilterLevel

from infra.local import supervisor
from tests.conftest import Stack
from tests.flows.runs import (
    PATIENT,
    at_leisure_while,
    loss_history,
    mlflow_runs,
    newest_run,
    processes,
    run_keys,
    wait_for_step,
)
from tests.waiting import wait_until

COMPLAINT = "the run goes on, and nobody sees it"


@pytest.mark.slow
def test_storage_that_is_away_ends_neither_the_ranks_nor_who_follows_them(stack: Stack, tmp_path: Path) -> None:
    """S3 stops under a run until its follower has found none again and again; no retry is used up for that."""
    before, steps, slow = run_keys(stack), 400, tmp_path / "slow"
    slow.touch()  # so that they are not done before it is noticed
    leisure = at_leisure_while(slow, after_step=70, num_ranks=2)
    values = ("--set", "seed=21", "--set", f"train.steps={steps}", *PATIENT, *leisure)
    command = stack.start("run", "digits", "--json", *values)
    run = wait_for_step(stack, before, step=60)
    ranks = {process.pid for process in processes(stack, "training.cluster.worker")}
    supervisor.remote(stack.home).stopProcess("s3")
    try:
        wait_until(lambda: _num_complaints(stack) >= 2, what="the follower to find no store")
        alive = {process.pid for process in processes(stack, "training.cluster.worker")}
    finally:
        supervisor.remote(stack.home).startProcess("s3")
        slow.unlink()
    output, _ = command.communicate(timeout=400)
    assert command.returncode == 0, output
    record = run.read()
    assert (record.departures, len(record.attempt_starts)) == ((), 1)
    assert alive == ranks, "a healthy job was stopped"
    assert record.result is not None
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert [step for step, _ in loss_history(stack, tracked.info.run_id)] == list(range(1, steps + 1))


def _num_complaints(stack: Stack) -> int:
    """In Prefect's log of the newest flow run, where a person sees them."""
    with SyncPrefectClient(stack.settings.prefect_api_url) as client:
        ours = LogFilterFlowRunId(any_=[newest_run(client).id])
        warnings = LogFilter(level=LogFilterLevel(ge_=logging.WARNING), flow_run_id=ours)
        return sum(COMPLAINT in entry.message for entry in client.read_logs(warnings))
