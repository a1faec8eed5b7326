"""What all stages share: when they are tried again, and how long they may take."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prefect.tasks import exponential_backoff

from tasks.stored_results import read_documents_only
from training.errors import (
    CancelledError,
    DamagedError,
    DeterministicError,
    FencedError,
    InfrastructureError,
    OutOfMemoryError,
    OvertakenError,
    RefusedError,
    UserError,
)
from training.patience import ask_until

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

log = logging.getLogger(__name__)

read_documents_only()
T = TypeVar("T")

PATIENCE_SECONDS = 300.0
PAUSE_SECONDS = 2.0
NOT_WORTH_A_RETRY = (
    UserError,
    DeterministicError,
    FencedError,
    DamagedError,
    OutOfMemoryError,
    OvertakenError,
    RefusedError,
    CancelledError,
)


async def worth_a_retry(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Only what may heal by itself is tried again: servers that are away, not mistakes."""
    error = await state.aresult(raise_on_failure=False)
    return not isinstance(error, NOT_WORTH_A_RETRY)


def stage_options(*, timeout_seconds: float) -> dict[str, Any]:
    """The options of every `@task`: retries with exponential backoff, a timeout, results persisted as JSON on S3."""
    return {
        "retries": 5,
        "retry_delay_seconds": exponential_backoff(backoff_factor=2),
        "retry_jitter_factor": 0.5,
        "retry_condition_fn": worth_a_retry,
        "timeout_seconds": timeout_seconds,
        "persist_result": True,
        "result_serializer": "json",
    }


def patiently(ask: Callable[[], T]) -> T:
    """For what a flow asks of servers between its stages, where nothing is tried again: one may be away just now.

    Raises `InfrastructureError`, or httpx's error for Prefect, if it stays away.
    """
    from httpx import HTTPError

    return ask_until(
        ask,
        seconds=PATIENCE_SECONDS,
        pause_seconds=PAUSE_SECONDS,
        errors=(InfrastructureError, HTTPError),
        tell=lambda error: log.warning("%s", error),
    )
