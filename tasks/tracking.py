"""Runs in MLflow: one per run key, with one point per (metric, step)."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.mlflow_client import (
    DATASET_TAG,
    GENERATION_TAG,
    MACHINE_LEARNING,
    RUN_KEY_TAG,
    STORE_TAG,
    ask,
    connect,
)
from training.config import Preset
from training.documents import MAX_DIGITS
from training.errors import FencedError, InfrastructureError, UserError
from training.runs.events import Event
from training.runs.record import Record, RunRecord
from training.runs.system import Sample
from training.s3.objectstore import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Metric

log = logging.getLogger(__name__)

BEFORE_ALL = -(1 << 62)
"""A step that no sample has."""
T = TypeVar("T")

METRICS = ("loss", "grad_norm", "learning_rate", "samples_per_second")
ATTEMPTS_FILE = "attempts.json"
SCORES_FILE = "scores.parquet"
BATCH_METRICS = 1000
MAX_TAG_CHARACTERS = 4000
DATASET_DIGEST_CHARACTERS = 36  # MLflow takes no more; the whole digest is in a tag


class Tracker:
    """The MLflow run of one run key."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self.experiment_id = str(client.get_run(run_id).info.experiment_id)
        self.url = run_url(uri, self.experiment_id, run_id)
        self.last_step = self._last_logged_step()
        self._last_samples: dict[int, int] = {}

    def _last_logged_step(self) -> int:
        """How far an earlier follower came: MLflow itself is the cursor, so the two cannot disagree."""
        return max((point.step for point in self.client.get_metric_history(self.run_id, "loss")), default=0)

    def forward(self, events: Iterable[Event]) -> None:
        """Log the steps' metrics under the events' own times; what is there already is not sent again.

        Raises `InfrastructureError` if MLflow is away; the same events may then be given again.
        """
        from mlflow.entities import Metric

        new = {event.step: event for event in reversed(list(events)) if event.kind == "step"}
        points = [
            Metric(name, value, int(event.time * 1000), step)
            for step, event in sorted(new.items())
            if step > self.last_step
            for name, value in _metrics(event).items()
        ]
        for batch in _batches(points):
            ask(lambda: self.client.log_batch(self.run_id, metrics=batch))  # noqa: B023
            self.last_step = batch[-1].step

    def forward_samples(self, samples: Iterable[tuple[int, Sample]]) -> None:
        """Log each node's system metrics; a sample's step is its second since the MLflow run was made (negative: MLflow
        was away then). Raises as `forward`."""
        from mlflow.entities import Metric

        begun = int(ask(lambda: self.client.get_run(self.run_id)).info.start_time) / 1000
        points = []
        try:
            for node, sample in samples:
                step = int(sample.time - begun)
                if step > self._last_sample(node):
                    self._last_samples[node] = step
                    points += [
                        Metric(f"system/node{node}/{name}", value, int(sample.time * 1000), step)
                        for name, value in asdict(sample).items()
                        if name != "time"
                    ]
            for batch in _batches(points):
                ask(lambda: self.client.log_batch(self.run_id, metrics=batch))  # noqa: B023
        except InfrastructureError:
            self._last_samples = {}  # MLflow itself knows how far it came
            raise

    def _last_sample(self, node: int) -> int:
        if node not in self._last_samples:
            name = f"system/node{node}/cpu_utilization_percentage"
            history = ask(lambda: self.client.get_metric_history(self.run_id, name))
            self._last_samples[node] = max((point.step for point in history), default=BEFORE_ALL)
        return self._last_samples[node]

    def note_attempts(self, tags: Mapping[str, str], table: Sequence[Mapping[str, Any]]) -> None:
        """The attempts at the run, visible beside it: tags, and a table. Raises as `forward`."""
        from mlflow.entities import RunTag

        ask(lambda: self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()]))
        columns = list(table[0]) if table else []
        document = {"columns": columns, "data": [[row[name] for name in columns] for row in table]}
        ask(lambda: self.client.log_dict(self.run_id, document, ATTEMPTS_FILE))

    def is_deleted(self) -> bool:
        """Whether somebody deleted the run in MLflow. Raises as `forward`."""
        return not _is_there(self.client, self.run_id)

    def finish(self, status: str) -> None:
        """Set the run's status ("FINISHED", "FAILED", "KILLED") unless it has it."""
        if ask(lambda: self.client.get_run(self.run_id)).info.status != status:
            ask(lambda: self.client.set_terminated(self.run_id, status))

    def reopen(self) -> None:
        ask(lambda: self.client.update_run(self.run_id, status="RUNNING"))

    def log_evaluation(
        self, metrics: Mapping[str, float], figures: Mapping[str, Figure], report: dict[str, Any], scores: bytes
    ) -> None:
        """Held-out metrics, the figures that a person looks at, the whole report, and each sample's scores as Parquet.
        The same again adds no point; of several evaluations at one step, MLflow shows the one with the latest time: the
        newest."""
        from mlflow.entities import Metric

        known = ask(lambda: self.client.get_run(self.run_id))
        if any(known.data.metrics.get(name) != value for name, value in metrics.items()):
            earlier = ask(lambda: self.client.get_metric_history(self.run_id, next(iter(metrics))))
            time_ms = max((point.timestamp + 1 for point in earlier), default=int(known.info.start_time))
            points = [Metric(name, value, time_ms, self.last_step) for name, value in metrics.items()]
            ask(lambda: self.client.log_batch(self.run_id, metrics=points))
        for name, figure in figures.items():
            self.client.log_figure(self.run_id, figure, f"figures/{name}.png")
        self.client.log_dict(self.run_id, report, "evaluation.json")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / SCORES_FILE
            path.write_bytes(scores)
            self.client.log_artifact(self.run_id, str(path))


def _batches(points: Sequence[Metric]) -> Iterator[list[Metric]]:
    """As many whole steps as MLflow takes at once: a step that was cut in two would be half missing after a death."""
    batch: list[Metric] = []
    for _, step in itertools.groupby(points, key=lambda point: point.step):
        whole = list(step)
        if batch and len(batch) + len(whole) > BATCH_METRICS:
            yield batch
            batch = []
        batch += whole
    if batch:
        yield batch


def ensure_run(
    uri: str, run: RunRecord, record: Record, preset: Preset, *, dataset: Mapping[str, Any], tags: Mapping[str, str]
) -> Tracker:
    """The MLflow run that the run record names, made if there is none, or if somebody deleted it in MLflow.

    Racing makers: the record decides, and the losers delete theirs. Raises `InfrastructureError` if MLflow is away,
    `FencedError` if a newer generation than `record`'s owns the run, `UserError` if somebody deleted the experiment.
    """
    client = connect(uri)
    seen = run.read()
    run_id = seen.tracking_run_id
    if seen.generation != record.generation:
        raise FencedError(f"run {run.run_key[:12]} was begun anew by somebody else")
    if run_id is None or not _is_there(client, run_id):
        made = ask(lambda: _create_run(client, run, preset, dataset=dataset, tags=tags))
        named = run.update(lambda newest: _with_tracking_run(newest, made, instead_of=seen))
        run_id = named.tracking_run_id
        if run_id != made:
            ask(lambda: client.delete_run(made))
        if run_id is None or named.generation != record.generation:
            raise FencedError(f"run {run.run_key[:12]} was begun anew by somebody else")
    return ask(lambda: Tracker(client, uri, run_id))


def require_shown(uri: str, preset: Preset) -> None:
    """Before anything expensive starts. Raises `UserError` if somebody deleted the experiment that shows this preset's
    runs. MLflow being away stops nothing."""
    try:
        found = ask(lambda: connect(uri).get_experiment_by_name(preset.name))
    except InfrastructureError as error:
        log.warning("%s", error)
        return
    if found is not None:
        _require_kept(found)


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """An MLflow run that says RUNNING."""

    run_id: str
    run_key: str
    generation: int


def open_runs(uri: str, store: Store) -> list[OpenRun]:
    """Those of the runs on `store`. Raises `InfrastructureError` if MLflow is away.

    One whose tags a person has changed, so that they tell of no run, is that person's.
    """
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in ask(lambda: client.search_experiments())]
    ours = f"attributes.status = 'RUNNING' and tags.`{STORE_TAG}` = '{store.location.uri()}'"
    found = ask(lambda: client.search_runs(experiments, filter_string=ours)) if experiments else ()
    return [run for each in found if (run := open_run(str(each.info.run_id), each.data.tags)) is not None]


def open_run(run_id: str, tags: Mapping[str, str]) -> OpenRun | None:
    """As its tags tell; None if they do not."""
    key, generation = tags.get(RUN_KEY_TAG, ""), tags.get(GENERATION_TAG, "")
    if not key or not generation.isdecimal() or len(generation) > MAX_DIGITS:
        return None
    return OpenRun(run_id=run_id, run_key=key, generation=int(generation))


def attach(uri: str, run_id: str) -> Tracker:
    """Raises `InfrastructureError` if MLflow is away, or has no such run."""
    return ask(lambda: Tracker(connect(uri), uri, run_id))


def delete_run(uri: str, run_id: str) -> None:
    """Raises `InfrastructureError` if MLflow is away."""
    ask(lambda: connect(uri).delete_run(run_id))


def lost_run(uri: str, record: Record) -> str | None:
    """The MLflow run that the record names, if somebody deleted it. Raises `InfrastructureError` if MLflow is away."""
    run_id = record.tracking_run_id
    return run_id if run_id is not None and not _is_there(connect(uri), run_id) else None


def _with_tracking_run(newest: Record, run_id: str, *, instead_of: Record) -> Record:
    is_as_seen = (newest.generation, newest.tracking_run_id) == (instead_of.generation, instead_of.tracking_run_id)
    return replace(newest, tracking_run_id=run_id) if is_as_seen else newest


def _is_there(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise InfrastructureError(f"MLflow does not answer as it should: {error}") from error


def _create_run(
    client: MlflowClient, run: RunRecord, preset: Preset, *, dataset: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
    from mlflow.exceptions import MlflowException

    made = client.create_run(
        _experiment_id(client, preset.name),
        run_name=f"{preset.name}-{run.run_key[:8]}",
        tags={
            RUN_KEY_TAG: run.run_key,
            GENERATION_TAG: str(run.read().generation),
            STORE_TAG: run.store.location.uri(),
            **tags,
        },
    )
    params = [Param(key, str(value)) for key, value in flat(preset.to_json())]
    client.log_batch(made.info.run_id, params=params, tags=[RunTag(DATASET_TAG, dataset["digest"])])
    source = json.dumps(
        {"uri": run.store.location.uri(f"datasets/{dataset['name']}/manifests/{dataset['digest']}.json")}
    )
    used = Dataset(
        name=dataset["name"],
        digest=dataset["digest"][:DATASET_DIGEST_CHARACTERS],
        source_type="s3",
        source=source,
        profile=json.dumps({"num_train_samples": dataset["num_train_samples"]}),
    )
    context = InputTag("mlflow.data.context", "training")
    inputs = [DatasetInput(dataset=used, tags=[context])]
    try:
        client.log_inputs(made.info.run_id, datasets=inputs)
    except MlflowException:  # another starter noted the same dataset at the same moment: by now it is there
        client.log_inputs(made.info.run_id, datasets=inputs)
    return str(made.info.run_id)


def _experiment_id(client: MlflowClient, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:  # another starter was first
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    _require_kept(found)
    return str(found.experiment_id)


def _require_kept(experiment: Experiment) -> None:
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"somebody deleted the experiment {experiment.name!r} in MLflow, where the preset's runs are shown: restore"
            f" it with `mlflow experiments restore --experiment-id {experiment.experiment_id}`, or give the preset"
            " another name"
        )


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A preset's values by dotted key, but for where its file lies."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif key != "folder":
            yield prefix + key, value


def url_of(uri: str, run_id: str) -> str:
    """Where a person sees the MLflow run. Raises `InfrastructureError` if MLflow is away."""
    return run_url(uri, str(ask(lambda: connect(uri).get_run(run_id)).info.experiment_id), run_id)


def run_url(uri: str, experiment_id: str, run_id: str, *, artifact: str = "") -> str:
    """Its page; or that of one of its artifacts."""
    return f"{uri}/#/experiments/{experiment_id}/runs/{run_id}{artifact and f'/artifacts/{artifact}'}{MACHINE_LEARNING}"


def direct_url(uri: str, run_id: str) -> str:
    """Its page, by a link that MLflow need not be asked for."""
    return f"{uri}/#/runs/{run_id}{MACHINE_LEARNING}"


def attach_file(uri: str, run_id: str, path: Path) -> str:
    """Put a file among a run's artifacts, in the place of one of that name; returns where a person sees it.

    Raises `InfrastructureError` if MLflow, or its storage, is away.
    """
    client = connect(uri)
    try:
        ask(lambda: client.log_artifact(run_id, str(path)))
    except OSError as error:  # so its client tells of a server that takes no file
        raise InfrastructureError(f"MLflow does not take {path.name}: {error}") from error
    experiment = str(ask(lambda: client.get_run(run_id)).info.experiment_id)
    return run_url(uri, experiment, run_id, artifact=path.name)


def quarantine_tags(records: Sequence[str]) -> dict[str, str]:
    """Which records of its dataset a run went on without."""
    shown = ", ".join(records)
    if len(shown) > MAX_TAG_CHARACTERS:
        shown = f"{len(records)} records: {shown[: MAX_TAG_CHARACTERS - 100]} …"
    return {"unbroken.quarantined": shown} if records else {}


def _metrics(event: Event) -> dict[str, float]:
    """What a step's event says, as MLflow's metrics."""
    found = {name: float(event.values[name]) for name in METRICS}
    return found | {f"validation.{name}": float(mean) for name, mean in event.values.get("validation", {}).items()}
