"""A Prefect retry goes on where the run stands: it does not begin anew."""

from __future__ import annotations

from prefect.client.orchestration import get_client

from infra.local import supervisor
from tests.conftest import Stack
from tests.flows.runs import loss_history, mlflow_runs, processes, run_keys, wait_for_step
from tests.waiting import wait_until


def test_retry_after_storage_was_away_re_attaches(stack: Stack) -> None:
    """S3 stops under a run until Prefect gives the train task up for a retry; the ranks never notice."""
    before = run_keys(stack)
    steps = 2000  # so that they are not done before it is given up
    command = stack.start("run", "digits", "--json", "--set", "seed=21", "--set", f"train.steps={steps}")
    run = wait_for_step(stack, before, step=60)
    ranks = {process.pid for process in processes(stack, "training.cluster.worker")}
    supervisor.remote(stack.home).stopProcess("s3")
    try:
        wait_until(lambda: "AwaitingRetry" in _train_states(), what="the train task to await its retry")
        alive = {process.pid for process in processes(stack, "training.cluster.worker")}
        assert alive == ranks, "a healthy job was stopped"
    finally:
        supervisor.remote(stack.home).startProcess("s3")
    output, _ = command.communicate(timeout=200)
    assert command.returncode == 0, output
    record = run.read()
    assert record.result is not None
    assert all(step >= 50 for step in record.attempt_starts[1:])
    (tracked,) = mlflow_runs(stack, run.run_key)
    assert [step for step, _ in loss_history(stack, tracked.info.run_id)] == list(range(1, steps + 1))


def _train_states() -> list[str]:
    with get_client(sync_client=True) as client:
        states = [task.state for task in client.read_task_runs() if task.name.startswith("train")]
    return [state.name for state in states if state is not None and state.name is not None]
