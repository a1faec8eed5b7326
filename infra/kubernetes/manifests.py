"""From a job to manifests, as pure functions: a JobSet; or a Kubeflow TrainJob and the runtime that it refers to."""

from __future__ import annotations

from typing import Any

from infra.kubernetes import pods
from infra.kubernetes.site import Site, job_name, require_possible
from infra.launcher import JobSpec
from training.errors import DeterministicError, UserError

REPLICATED_JOB = "node"
FAILED_FOR_GOOD = [UserError.exit_code, DeterministicError.exit_code]
"""An agent's final exit codes, beside 0."""
PREEMPTED = [75]
"""training.cluster.agent.EXIT_PREEMPTED"""
NUM_TRIES = 20
"""Of one agent, if it is the agent that fails. The job controller pauses longer each time, up to some minutes."""
KEEP_SECONDS = 24 * 3600
"""After its end a job can still be looked at for so long."""
DEFAULT_GRACE_SECONDS = 10.0
MANAGER = "unbroken/launcher"


def jobset(site: Site, spec: JobSpec, *, grace_seconds: float) -> dict[str, Any]:
    """A JobSet (jobset.x-k8s.io/v1alpha2): one indexed job with a pod for each agent.

    `grace_seconds`: what a preempted agent takes at most for a last checkpoint. Raises `UserError` naming a field of
    the preset that a cluster would refuse.
    """
    require_possible(spec)
    template = pods.pod_template(
        site,
        priority=spec.needs.priority,
        grace_seconds=grace_seconds,
        tolerations=pods.tolerations(site, has_gpus=spec.needs.num_gpus > 0),
        command=pods.agent_command(spec),
        environment=pods.agent_environment(spec),
        resources=pods.agent_resources(site, spec),
    )
    job = _indexed_job(template, num_nodes=spec.num_nodes)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(site, spec),
        "spec": {**_jobset_spec(job), "ttlSecondsAfterFinished": KEEP_SECONDS},
    }


def training_runtime(site: Site, *, priority: str = "", of_cluster: bool = False) -> dict[str, Any]:
    """What all TrainJobs of a site share, but for their number of nodes, command, environment and resources.

    A TrainJob cannot choose its priority, so there is one runtime for each.
    """
    template = pods.pod_template(
        site,
        priority=priority,
        grace_seconds=DEFAULT_GRACE_SECONDS,
        tolerations=pods.tolerations(site, has_gpus=False),
    )
    namespace = {} if of_cluster else {"namespace": site.namespace}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "ClusterTrainingRuntime" if of_cluster else "TrainingRuntime",
        "metadata": {"name": _runtime_name(priority), **namespace, "labels": dict(pods.LABELS)},
        "spec": {"mlPolicy": {"numNodes": 1}, "template": {"spec": _jobset_spec(_indexed_job(template, num_nodes=1))}},
    }


def train_job(site: Site, spec: JobSpec, *, grace_seconds: float, of_cluster: bool = False) -> dict[str, Any]:
    """A TrainJob of Kubeflow Trainer v2, for `training_runtime` of the same site and priority; else as `jobset`."""
    require_possible(spec)
    resources = pods.agent_resources(site, spec)
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(site, spec),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "ClusterTrainingRuntime" if of_cluster else "TrainingRuntime",
                "name": _runtime_name(spec.needs.priority),
            },
            "trainer": {
                "image": site.image,
                "numNodes": spec.num_nodes,
                "command": pods.agent_command(spec),
                "env": pods.agent_environment(spec),
                **({"resourcesPerNode": resources} if resources else {}),
            },
            "runtimePatches": [_pod_patch(site, spec, grace_seconds)],
        },
    }


def _jobset_spec(job: dict[str, Any]) -> dict[str, Any]:
    """No restart of the whole: an agent that is lost must not cost the others theirs.

    Kubeflow's trainer finds the job that it sizes by its label.
    """
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [
            {
                "name": REPLICATED_JOB,
                "replicas": 1,
                "template": {
                    "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                    "spec": job,
                },
            }
        ],
    }


def _indexed_job(template: dict[str, Any], *, num_nodes: int) -> dict[str, Any]:
    """A JobSpec of batch/v1. Each agent is replaced on its own, and counts its failures on its own."""
    return {
        "completionMode": "Indexed",
        "completions": num_nodes,
        "parallelism": num_nodes,
        "backoffLimitPerIndex": NUM_TRIES,
        "maxFailedIndexes": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": _exit_codes(FAILED_FOR_GOOD)},
                {"action": "Ignore", "onExitCodes": _exit_codes(PREEMPTED)},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "successPolicy": {"rules": [{"succeededCount": 1}]},
        "template": template,
    }


def _exit_codes(values: list[int]) -> dict[str, Any]:
    return {"containerName": pods.CONTAINER, "operator": "In", "values": values}


def _pod_patch(site: Site, spec: JobSpec, grace_seconds: float) -> dict[str, Any]:
    """What is this run's alone in the pods. A list of tolerations replaces the runtime's."""
    pod = {
        "terminationGracePeriodSeconds": pods.termination_seconds(grace_seconds),
        "tolerations": pods.tolerations(site, has_gpus=spec.needs.num_gpus > 0),
    }
    job = {"name": REPLICATED_JOB, "template": {"spec": {"template": {"spec": pod}}}}
    return {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}


def _runtime_name(priority: str) -> str:
    return f"unbroken-{priority}" if priority else "unbroken"


def _metadata(site: Site, spec: JobSpec) -> dict[str, Any]:
    """A key is longer than a label may be."""
    return {
        "name": job_name(spec),
        "namespace": site.namespace,
        "labels": {**pods.LABELS, "app.kubernetes.io/instance": job_name(spec)},
        "annotations": {
            "unbroken/run-key": spec.key,
            "unbroken/generation": str(spec.generation),
            **({"unbroken/owner": spec.owner} if spec.owner else {}),
        },
    }
