"""State hooks, and how errors are shown."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from training.errors import UnbrokenError


def cancel_jobs_of(flow: Any, flow_run: Any, state: Any) -> None:
    """On cancellation: leave no rank of the flow run alive, even if its own process could not see to it. A job that
    another flow run asked for too goes on; if none of those lives, the reaper ends it."""
    from prefect.logging.loggers import flow_run_logger

    from infra.engines import make_launcher
    from infra.launcher import cancel_owned_by
    from infra.settings import load_settings

    keys = cancel_owned_by(make_launcher(load_settings()), str(flow_run.id))
    flow_run_logger(flow_run, flow).info("cancelled %d jobs of the engine", len(keys))  # we are in the worker, maybe


def outlive_the_worker() -> None:
    """Call at the start of a flow. A killed worker takes along the pipe that this process logs into, and Rich's answer
    to that is to end the process."""
    for logger in (logging.root, *map(logging.getLogger, tuple(logging.root.manager.loggerDict))):
        for handler in logger.handlers:
            console = getattr(handler, "console", None)
            if console is not None:
                console.on_broken_pipe = partial(setattr, console, "quiet", True)


class _OneLine(logging.Filter):
    """Shows an error that was raised on purpose as its message, without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], UnbrokenError):
            record.exc_info = record.exc_text = None
        return True


def log_user_errors_in_one_line() -> None:
    """Call at the start of a flow; also lets the stages' own lines through to Prefect's log."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_OneLine())
    for name in ("tasks", "training"):
        logging.getLogger(name).setLevel(logging.INFO)
