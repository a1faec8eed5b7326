"""What a cluster calls things, and what it would refuse."""

from __future__ import annotations

import re
from dataclasses import dataclass

from infra.launcher import JobSpec
from training.errors import UserError

DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PRIORITY_CLASS = re.compile(r"[a-z0-9]([a-z0-9.-]{0,98}[a-z0-9])?")
DIGEST = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
TAG = re.compile(r"[^\s@]*[^\s@/:]:(?!latest$)[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
MAX_NODES = 99_999
"""More would make the names of pods longer than the 63 characters that a host may have."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """The image that the pods run, and names in the cluster."""

    image: str
    namespace: str = "unbroken"
    service_account: str = "unbroken-agent"
    """Of the agents. It needs no rights in the cluster; a role for S3 may hang on it."""
    secret: str = "unbroken-s3"
    """With the S3 credentials, as AWS's standard variables. It need not exist where the service account has a role."""
    gpu_resource: str = "nvidia.com/gpu"

    def __post_init__(self) -> None:
        if not (DIGEST.fullmatch(self.image) or TAG.fullmatch(self.image)):
            raise UserError(
                f"image = {self.image!r} must name a version, as in registry.example.org/unbroken:0.1.0 or"
                " …@sha256:…: a run is a function of its code"
            )
        for field in ("namespace", "service_account", "secret"):
            value = getattr(self, field)
            if not DNS_LABEL.fullmatch(value):
                raise UserError(
                    f"{field} = {value!r} must be lowercase letters, digits and '-', at most 63, a letter first"
                )


def job_name(spec: JobSpec) -> str:
    """Who submits the same generation of the same run names the same object."""
    return f"unbroken-{spec.key[:16]}-{spec.generation}"


def require_possible(spec: JobSpec) -> None:
    """Raises `UserError` naming the preset's field that a cluster would refuse."""
    priority = spec.needs.priority
    if priority and not PRIORITY_CLASS.fullmatch(priority):
        raise UserError(
            f"launch.priority = {priority!r} must be the name of a PriorityClass of the cluster: lowercase letters,"
            " digits, '-' and '.'"
        )
    if spec.num_nodes > MAX_NODES:
        raise UserError(f"launch.nodes = {spec.num_nodes} must be at most {MAX_NODES} on Kubernetes")
