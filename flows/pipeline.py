"""The pipeline: shard → train → evaluate → register."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import publish
from flows.hooks import cancel_jobs_of, log_user_errors_in_one_line, outlive_the_worker
from tasks.evaluate import evaluate
from tasks.opening import identify
from tasks.policy import patiently
from tasks.quarantine import trained
from tasks.register import registered
from tasks.report.attach import attach_if_possible
from tasks.results import Dataset, PipelineResult, TrainedModel
from tasks.shard import shard
from tasks.stack import open_stack
from tasks.train import train
from training.data.writer import NUM_AT_ONCE
from training.preset_file import load_preset

PARTITIONS_AT_ONCE: Any = ThreadPoolTaskRunner(max_workers=NUM_AT_ONCE)


@flow(
    name="pipeline",
    task_runner=PARTITIONS_AT_ONCE,
    on_cancellation=[cancel_jobs_of],
    persist_result=True,
    result_serializer="json",
)
def pipeline(
    preset: str, overrides: dict[str, Any] | None = None, fresh: bool = False, quarantine: bool = False
) -> PipelineResult:
    """From raw data to a registered model.

    Args:
        preset: a built-in preset's name, or the path of a TOML file.
        overrides: values by dotted key, such as {"train.steps": 20}.
        fresh: train again from step 0, although this run is finished or begun.
        quarantine: go on without records that make the training fail; they are withdrawn from the dataset.
    """
    outlive_the_worker()
    publish.machine()
    log_user_errors_in_one_line()
    config = publish.pinned_once(open_stack()[0], load_preset(preset, overrides))

    def train_in_flow(dataset: Dataset) -> TrainedModel:
        publish.run_key(patiently(lambda: identify(config, dataset)).run_key)
        return train(config, dataset, owner=publish.flow_run_id(), fresh=publish.flow_run_id() if fresh else None)

    dataset, model = trained(
        config, shard=lambda: shard(config, owner=publish.flow_run_id()), train=train_in_flow, quarantine=quarantine
    )
    evaluation = evaluate(config, dataset, model)
    version = registered(config, dataset, model, evaluation)
    report = attach_if_possible(*open_stack(), version.run_key)
    links = publish.results(dataset, evaluation, version, maybe_report=report)
    return PipelineResult(dataset=dataset, model=model, evaluation=evaluation, registration=version, links=links)
