"""`runs render`: what to apply to a Kubernetes cluster, so that a run's agents train there (docs/kubernetes.md)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from flows.cli.output import print_json
from flows.cli.run import Set, check_input, overrides_of
from flows.cli.stack import Json
from training.config import Preset
from training.errors import UserError
from training.preset_file import load_preset

if TYPE_CHECKING:
    from infra.kubernetes.site import Site
    from infra.launcher import JobSpec


def add_to(app: App) -> None:
    app["runs"].command(render)


def render(
    preset: str,
    *,
    image: Annotated[str, Parameter(help="What the pods run, with a tag or a digest.")],
    namespace: Annotated[str, Parameter(help="Where the job shall be.")] = "unbroken",
    kind: Annotated[
        Literal["TrainJob", "JobSet"], Parameter(help="For Kubeflow's trainer, or for the JobSet controller alone.")
    ] = "TrainJob",
    set_: Set = None,
    json: Json = False,
) -> None:
    """Print Kubernetes manifests of PRESET's run, for `kubectl apply -f -`. Nothing is sent to a cluster.

    Shards the data and opens the run, if that was not done, as `train` does: pods are told by the store what to do.
    """
    from infra.kubernetes.site import Site

    config = load_preset(preset, overrides_of(set_))
    site = Site(image=image, namespace=namespace)
    _require_far_store()
    check_input(config)
    manifests = _manifests(site, _job_spec(config), kind, grace_seconds=config.launch.grace_seconds)
    if json:
        print_json({"apiVersion": "v1", "kind": "List", "items": manifests})
        return
    import yaml

    print(yaml.safe_dump_all(manifests, sort_keys=False, width=120), end="")


def _manifests(site: Site, spec: JobSpec, kind: str, *, grace_seconds: float) -> list[dict[str, Any]]:
    """In the order in which they are to be made."""
    from infra.kubernetes.manifests import jobset, train_job, training_runtime

    if kind == "JobSet":
        return [jobset(site, spec, grace_seconds=grace_seconds)]
    runtime = training_runtime(site, priority=spec.needs.priority)
    return [runtime, train_job(site, spec, grace_seconds=grace_seconds)]


def _job_spec(preset: Preset) -> JobSpec:
    from tasks.initial import pinned
    from tasks.opening import identify, open_run
    from tasks.shard import shard as shard_stage
    from tasks.stack import open_stack
    from tasks.train import job_spec

    settings, store = open_stack()
    preset = pinned(settings, preset)
    identity = identify(preset, shard_stage.fn(preset))
    _, record = open_run(store, identity, fresh=None)
    if record.result is not None:
        print(f"run {record.key[:12]} is finished: its agents would end at once", file=sys.stderr)
    return job_spec(settings, store, identity, record)


def _require_far_store() -> None:
    from infra.settings import load_settings

    settings = load_settings()
    if settings.s3_is_local:
        raise UserError(
            f"s3.endpoint = {settings.s3_endpoint!r} is the local stack's, which no pod can reach: name a store that"
            " this machine and the cluster share in unbroken.toml, [s3]"
        )
