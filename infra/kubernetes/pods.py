"""The pod of one agent: docs/kubernetes.md says which failure each of its settings is for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from infra.kubernetes.site import Site
from infra.launcher import JobSpec

CONTAINER = "node"
"""As Kubeflow's trainer calls the container that it starts."""
LABELS = {"app.kubernetes.io/name": "unbroken", "app.kubernetes.io/component": "agent"}
NODE_NUMBER = "$(JOB_COMPLETION_INDEX)"
"""An indexed job says it to each of its pods, and the kubelet puts it into the command."""
NODE_LOST_SECONDS = 10
GRACE_MARGIN_SECONDS = 20
"""Beyond the last checkpoint: for the signal to arrive and the process to end."""
USER = 1000


def pod_template(
    site: Site,
    *,
    priority: str,
    grace_seconds: float,
    tolerations: list[dict[str, Any]],
    command: list[str] | None = None,
    environment: list[dict[str, Any]] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A PodTemplateSpec of core/v1. What is left out here, a TrainJob puts in."""
    container = {
        "name": CONTAINER,
        "image": site.image,
        "imagePullPolicy": "IfNotPresent",
        **({"command": command} if command else {}),
        "env": [*own_environment(), *(environment or [])],
        "envFrom": [{"secretRef": {"name": site.secret, "optional": True}}],
        **({"resources": resources} if resources else {}),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/tmp"}],
    }
    return {
        "metadata": {"labels": dict(LABELS)},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": site.service_account,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "shareProcessNamespace": True,
            **({"priorityClassName": priority} if priority else {}),
            "terminationGracePeriodSeconds": termination_seconds(grace_seconds),
            "securityContext": security_context(),
            "tolerations": tolerations,
            "topologySpreadConstraints": [_apart()],
            "containers": [container],
            "volumes": [
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
                {"name": "scratch", "emptyDir": {}},
            ],
        },
    }


def agent_command(spec: JobSpec) -> list[str]:
    """Its first word is an interpreter of the machine that submits."""
    return ["python", *(part.replace("{node}", NODE_NUMBER) for part in spec.command[1:])]


def agent_environment(spec: JobSpec) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in sorted(spec.environment.items())]


def own_environment() -> list[dict[str, Any]]:
    """Where the others find this pod; and that only /tmp can be written to."""
    return [
        {"name": "UNBROKEN_NODE_ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "HOME", "value": "/tmp"},
    ]


def agent_resources(site: Site, spec: JobSpec) -> dict[str, Any] | None:
    """Requests equal to limits, so that the kubelet evicts these pods last."""
    wanted = {"cpu": spec.needs.num_cpus, "memory": spec.needs.memory_bytes, site.gpu_resource: spec.needs.num_gpus}
    amounts = {name: str(amount) for name, amount in wanted.items() if amount}
    return {"requests": amounts, "limits": dict(amounts)} if amounts else None


def termination_seconds(grace_seconds: float) -> int:
    return math.ceil(grace_seconds) + GRACE_MARGIN_SECONDS


def tolerations(site: Site, *, has_gpus: bool) -> list[dict[str, Any]]:
    """Nodes that may be used although they are taken away at times (spot), and how long a silent one is waited for."""
    found: list[dict[str, Any]] = [
        {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"},
        {"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"},
    ]
    if has_gpus:
        found.append({"key": site.gpu_resource, "operator": "Exists", "effect": "NoSchedule"})
    for reason in ("unreachable", "not-ready"):
        key = f"node.kubernetes.io/{reason}"
        lost = {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOST_SECONDS}
        found.append(lost)
    return found


def security_context() -> dict[str, Any]:
    """Of a pod: what the Pod Security Standard `restricted` asks for."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _apart() -> dict[str, Any]:
    """A host that is lost shall take one agent of a run, if there are hosts enough."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(LABELS)},
        "matchLabelKeys": ["jobset.sigs.k8s.io/jobset-name"],
    }
