"""Batch prediction as a flow. Killed, it goes on where it was; run again, it finds what is done."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows import publish
from flows.hooks import log_user_errors_in_one_line, outlive_the_worker
from tasks.policy import patiently
from tasks.predict import Predicted
from tasks.predict import predict as predict_stage
from tasks.prediction.wanted import find_wanted
from tasks.stack import open_stack

OPTIONS: dict[str, Any] = {"persist_result": True, "result_serializer": "json"}


@flow(name="predict", **OPTIONS)
def predict(model: str, data: str, processes: int = 2) -> Predicted:
    """Predict every sample of a dataset version; each shard's predictions are one Parquet object.

    Args:
        model: NAME (its champion), NAME@champion, NAME@VERSION or NAME@ALIAS.
        data: a dataset's name (its newest version), or NAME@DIGEST.
        processes: how many share the shards on this machine.
    """
    outlive_the_worker()
    publish.machine()
    log_user_errors_in_one_line()
    wanted = publish.wanted_once(lambda: find_wanted(*open_stack(), model, data))
    done = predict_stage(wanted, processes=processes)
    text = (
        f"{done.model} version {done.version} on {done.dataset} {done.dataset_digest[:12]}:"
        f" {done.num_samples} predictions, {done.manifest}"
    )
    patiently(lambda: create_markdown_artifact(key="predictions", markdown=text, description="Predictions"))
    return done
