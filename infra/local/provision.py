"""What the servers must hold before the first run: the bucket, Prefect's work pool, result storage and deployments."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from infra.fetching import fetch
from infra.local.services import MAX_RUNS_AT_ONCE, WORK_POOL, WORK_QUEUES
from infra.passwords import prefect_headers
from infra.settings import PROJECT_ROOT, RESULTS_BLOCK, Settings
from training.documents import digest_of
from training.errors import InfrastructureError
from training.s3.objectstore import Store, StoreLocation

DEPLOYMENTS = PROJECT_ROOT / "infra" / "prefect.yaml"
FLOWS = ("pipeline.py", "lifecycle.py")
FLOW_COMMAND = "setsid python -m prefect.engine"
"""A session of its own: who stops the worker, and its process group, stops no flow run."""


def create_bucket(settings: Settings) -> None:
    location = StoreLocation(
        endpoint=settings.s3_endpoint, bucket=settings.s3_bucket, prefix=settings.s3_prefix, region=settings.s3_region
    )
    Store(location).create_bucket_if_missing()


def provision(settings: Settings, report: Callable[[str], None]) -> None:
    """Make Prefect's objects, unless they are there as they were made last. Safe to repeat."""
    mark = settings.home / "provisioned"
    wanted = digest_of(
        {
            "deployments": DEPLOYMENTS.read_text(),
            "flows": [(PROJECT_ROOT / "flows" / name).read_text() for name in FLOWS],
            "pool": [WORK_POOL, *WORK_QUEUES, MAX_RUNS_AT_ONCE],
            "prefect": settings.prefect_api_url,
            "s3": [settings.s3_endpoint, settings.s3_bucket, settings.s3_prefix],
        }
    )
    if mark.exists() and mark.read_text() == wanted and not are_gone(settings.prefect_api_url):
        return
    report("registering the work pool, the result storage and the deployments")
    _register_pool_and_storage(settings)
    _deploy()
    mark.write_text(wanted)


def are_gone(api_url: str) -> bool:
    """Whether Prefect's server lacks the work pool or a deployment: its database may be older than these."""
    import yaml

    wanted = yaml.safe_load(DEPLOYMENTS.read_text())["deployments"]
    names = [f"{each['entrypoint'].rpartition('.')[2]}/{each['name']}" for each in wanted]
    paths = [f"work_pools/{WORK_POOL}", *(f"deployments/name/{name}" for name in names)]
    return any(_is_missing(f"{api_url}/{path}") for path in paths)


def _is_missing(url: str) -> bool:
    """A server that does not answer, or not to strangers, does not say so."""
    try:
        fetch(urllib.request.Request(url, headers=prefect_headers()), timeout=10)
        return False
    except urllib.error.HTTPError as error:
        return error.code == 404
    except OSError:
        return False


def _register_pool_and_storage(settings: Settings) -> None:
    """The block names the bucket and holds no key: those come from the credential chain."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect_aws import AwsCredentials, S3Bucket
    from prefect_aws.client_parameters import AwsClientParameters

    S3Bucket.register_type_and_schema()
    block = S3Bucket(
        bucket_name=settings.s3_bucket,
        bucket_folder=f"{settings.s3_prefix}prefect",
        credentials=AwsCredentials(
            region_name=settings.s3_region,
            aws_client_parameters=AwsClientParameters(endpoint_url=settings.s3_endpoint),
        ),
    )
    block.save(RESULTS_BLOCK, overwrite=True)
    with get_client(sync_client=True) as client:
        if WORK_POOL not in {pool.name for pool in client.read_work_pools()}:  # a person may have set another limit
            client.create_work_pool(
                WorkPoolCreate(
                    name=WORK_POOL,
                    type="process",
                    concurrency_limit=MAX_RUNS_AT_ONCE,
                    base_job_template=_job_template(),
                )
            )
        known = {queue.name: queue for queue in client.read_work_queues(work_pool_name=WORK_POOL)}
        for priority, name in enumerate(WORK_QUEUES, start=1):
            if name in known:
                client.update_work_queue(known[name].id, priority=priority)
            else:
                client.create_work_queue(name, work_pool_name=WORK_POOL, priority=priority)


def _job_template() -> dict[str, Any]:
    """Prefect's own, but for the command: one that is named is started at once, and no process before it that looks for
    code to fetch."""
    from prefect.workers.process import ProcessWorker

    template: dict[str, Any] = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["command"]["default"] = FLOW_COMMAND
    return template


def _deploy() -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(DEPLOYMENTS), "--all"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InfrastructureError(f"`prefect deploy` failed:\n{(done.stdout + done.stderr)[-2000:]}")
