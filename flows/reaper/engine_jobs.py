"""The engine's jobs: those that were cancelled, or whose flow run was, are ended, although who should have died."""

from __future__ import annotations

import logging

from flows.reaper.decide import is_flow_run, is_job_unwanted
from flows.reaper.flow_runs import FlowRuns
from infra.launcher import CANCELLED, Launcher

log = logging.getLogger(__name__)


def end_unwanted(launcher: Launcher, flow_runs: FlowRuns) -> None:
    """Cancel every job that nobody wants any more."""
    owned = {key: owners for key, owners in launcher.jobs().items() if owners}
    states = flow_runs.states({owner for owners in owned.values() for owner in owners if is_flow_run(owner)})
    for key, owners in owned.items():
        if CANCELLED in owners:
            log.info("job %s: it was cancelled, and something of it is left: ended", key[:12])
            launcher.reap(key)  # not `cancel`: it may have been submitted again since
        elif is_job_unwanted([states.get(owner) for owner in owners]) and launcher.cancel(key, by=set(owners)):
            # unless another flow run has asked for it since
            log.info("job %s: of its flow runs, one was cancelled and none lives: ended", key[:12])
