"""The engine's jobs: those whose flow run was cancelled are ended, although its hook failed or its process died."""

from __future__ import annotations

import logging
from uuid import UUID

from flows.reaper.decide import is_job_unwanted
from flows.reaper.flow_runs import FlowRuns
from infra.launcher import Launcher

log = logging.getLogger(__name__)


def end_unwanted(launcher: Launcher, flow_runs: FlowRuns) -> None:
    """Cancel every job that nobody wants any more."""
    owned = {key: owners for key, owners in launcher.jobs().items() if owners}
    states = flow_runs.states({owner for owners in owned.values() for owner in owners if _is_flow_run(owner)})
    for key, owners in owned.items():
        if is_job_unwanted([states.get(owner) for owner in owners]):
            log.info("job %s: its flow run was cancelled: ended", key[:12])
            launcher.cancel(key)


def _is_flow_run(owner: str) -> bool:
    try:
        UUID(owner)
    except ValueError:
        return False
    return True
