"""How MLflow is asked: by a client that gives up soon. Its absence is an error of our own."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from training.errors import InfrastructureError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

RUN_KEY_TAG = "unbroken.run_key"
GENERATION_TAG = "unbroken.generation"
"""Grows with each `--fresh`: the MLflow run of the greatest counts."""
DATASET_TAG = "unbroken.dataset_digest"
STORE_TAG = "unbroken.store"
"""Where the run's record lies: several stores may have runs in one MLflow."""
WEIGHTS_TAG = "unbroken.weights_sha256"
INEXACT_TAG = "unbroken.inexact"
"""The setting by which its run gives another result if it is done again; exact ones have none."""

MACHINE_LEARNING = "?workflowType=machine_learning"  # else MLflow opens its other face, which has no registry


def connect(uri: str) -> MlflowClient:
    """A client that gives up soon: whoever calls it has something better to do than to wait."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def ask(call: Callable[[], T]) -> T:
    """MLflow's answer, its being away told by one of our own errors."""
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        raise InfrastructureError(f"MLflow does not answer as it should: {error}") from error
