"""Checks manifests as a cluster would, by the schemas in schemas.json, but takes no field that these do not know."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "schemas.json"
KINDS = {
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): "JobSet",
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainingRuntime",
    ("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime"): "TrainingRuntime",
    ("batch/v1", "Job"): "io.k8s.api.batch.v1.Job",
    ("apps/v1", "Deployment"): "io.k8s.api.apps.v1.Deployment",
    ("v1", "Namespace"): "io.k8s.api.core.v1.Namespace",
    ("v1", "ServiceAccount"): "io.k8s.api.core.v1.ServiceAccount",
    ("networking.k8s.io/v1", "NetworkPolicy"): "io.k8s.api.networking.v1.NetworkPolicy",
    ("rbac.authorization.k8s.io/v1", "Role"): "io.k8s.api.rbac.v1.Role",
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): "io.k8s.api.rbac.v1.RoleBinding",
}
POD_TEMPLATE = "io.k8s.api.core.v1.PodTemplateSpec"


def complaints(manifest: dict[str, Any]) -> list[str]:
    """What is wrong, each with its path. Pods inside custom resources are checked by core/v1's schema as well."""
    definition = KINDS[manifest["apiVersion"], manifest["kind"]]
    found = _complaints(definition, manifest)
    for template in pod_templates(manifest):
        found += _complaints(POD_TEMPLATE, template)
    return found


def pod_templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those inside a JobSet or a training runtime."""
    spec = manifest.get("spec", {})
    jobset = spec["template"].get("spec", {}) if manifest["kind"].endswith("TrainingRuntime") else spec
    for job in jobset.get("replicatedJobs", []) if isinstance(jobset, dict) else []:
        yield job["template"]["spec"]["template"]


def _complaints(definition: str, document: Any) -> list[str]:
    errors = Draft202012Validator({"$ref": f"#/definitions/{definition}", "definitions": _definitions()})
    return [f"{error.json_path}: {error.message}" for error in errors.iter_errors(document)]


@cache
def _definitions() -> dict[str, Any]:
    return _strict(json.loads(SCHEMAS.read_text())["definitions"])


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(strict.get("properties"), dict) and not strict.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if strict.get("x-kubernetes-int-or-string") or strict.get("format") == "int-or-string":
        strict.pop("type", None)
        strict["type"] = ["integer", "string"]
    return strict
