"""What all stages share: when they are tried again, how long they may take, and where they find the stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prefect.tasks import exponential_backoff

from infra.settings import Settings, activate, load_settings
from training.errors import CancelledError, DamagedError, DeterministicError, FencedError, UserError
from training.objectstore import Store, StoreLocation

if TYPE_CHECKING:
    from prefect import Task
    from prefect.client.schemas.objects import State, TaskRun

NOT_WORTH_A_RETRY = (UserError, DeterministicError, FencedError, DamagedError, CancelledError)


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


def open_stack() -> tuple[Settings, Store]:
    """The stack's settings (put into the environment, where every library finds them) and its object store."""
    settings = load_settings()
    activate(settings)
    return settings, Store(store_location(settings))


def store_location(settings: Settings) -> StoreLocation:
    return StoreLocation(
        endpoint=settings.s3_endpoint,
        bucket=settings.s3_bucket,
        prefix=settings.s3_prefix,
        region=settings.s3_region,
    )
