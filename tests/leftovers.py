"""What a test that failed leaves at work on a stack: a run that trains for ever takes the CPU from all after it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelled

from infra.local import supervisor
from infra.local.launcher import LocalLauncher

FLOW = "prefect.engine"


def end_all_runs(home: Path, prefect_api_url: str) -> None:
    """Every flow run of a stack, and every job: the flows first, which would submit their jobs again."""
    with SyncPrefectClient(prefect_api_url) as client:
        for run in client.read_flow_runs():
            if run.state is not None and not run.state.is_final():
                client.set_flow_run_state(run.id, Cancelled(), force=True)
    for process in supervisor.stack_processes(home):
        with contextlib.suppress(psutil.Error):  # it ends by itself
            if FLOW in process.cmdline():
                process.kill()
    launcher = LocalLauncher(home)
    for key in launcher.jobs():
        launcher.cancel(key)
