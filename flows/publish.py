"""What a flow run shows while it runs and when it is done: labels for the command line, artifacts for a person."""

from __future__ import annotations

from uuid import UUID

from infra.settings import load_settings
from tasks.results import Dataset, Evaluation, Registration
from tasks.stack import store_location
from tasks.train import links
from training.objectstore import Store
from training.record import RunRecord

RUN_KEY_LABEL = "unbroken.run_key"
RESULTS_ARTIFACT = "results"
LINKS_ARTIFACT = "links"


def flow_run_id() -> str:
    """The id of the flow run that this process executes."""
    from prefect.runtime import flow_run

    return str(flow_run.get_id())


def run_key(key: str) -> None:
    """Label the flow run, so that others can follow the training before it ends."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(flow_run_id()), {RUN_KEY_LABEL: key})


def results(dataset: Dataset, evaluation: Evaluation, version: Registration) -> dict[str, str]:
    """Make artifacts, a table of the results and the links to where everything is; returns the links."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    percent = f"{evaluation.confidence:.0%}"
    create_table_artifact(
        key=RESULTS_ARTIFACT,
        table=[
            {"metric": name, "value": round(e.value, 5), f"{percent} low": round(e.low, 5), "high": round(e.high, 5)}
            for name, e in evaluation.metrics.items()
        ],
        description=f"{version.name} version {version.version} on {evaluation.num_samples} held-out samples",
    )
    settings = load_settings()
    found = links(settings, RunRecord(Store(store_location(settings)), version.run_key))
    found["registry"] = version.url
    found["prefect"] = f"{settings.prefect_ui_url}/runs/flow-run/{flow_run_id()}"
    lines = [f"- {name}: {url}" for name, url in found.items()]
    lines += [f"- run key: `{version.run_key}`", f"- dataset: `{dataset.name}` `{dataset.digest}`"]
    create_markdown_artifact(key=LINKS_ARTIFACT, markdown="\n".join(lines), description="Where everything is")
    return found
