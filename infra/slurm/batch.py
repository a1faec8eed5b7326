"""A job to sbatch's arguments and script: pure functions."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path

from infra.launcher import JobSpec
from infra.slurm.site import Site
from training.errors import UserError

PASSED_ON = (
    "HOME",
    "PATH",
    "USER",
    "LANG",
    "LD_LIBRARY_PATH",
    "AWS_ACCESS_KEY_ID",
    "AWS_CONFIG_FILE",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_PROFILE",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
)
"""What a node inherits from who submits, by name: no value is on a command line, where others could read it."""
MEBIBYTE = 1 << 20


def sbatch_arguments(spec: JobSpec, site: Site, *, name: str, log_folder: Path) -> list[str]:
    """All but the script and how. Raises `UserError` for a priority that the site does not have."""
    needs = spec.needs
    options = {
        "job-name": name,
        "array": f"0-{spec.num_nodes - 1}",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": needs.num_cpus,
        "mem": f"{math.ceil(needs.memory_bytes / MEBIBYTE)}M" if needs.memory_bytes else "",
        "gres": f"gpu:{needs.num_gpus}" if needs.num_gpus else "",
        "time": math.ceil(needs.time_limit_seconds / 60),
        "open-mode": "append",
        "output": log_folder / "node%a.log",
        "chdir": log_folder,
        "export": ",".join(sorted({*spec.environment, *PASSED_ON})),
        "account": site.account,
        **placement(spec.needs.priority, site),
    }
    given = [f"--{name}={value}" for name, value in options.items() if value]
    return ["--parsable", "--requeue", *given]


def placement(priority: str, site: Site) -> dict[str, str]:
    """The partition and quality of service of a priority."""
    found = {"partition": site.partition, "qos": site.qos}
    if not priority:
        return found
    if priority not in site.priorities:
        known = ", ".join(sorted(site.priorities)) or "none: [slurm.priorities] in unbroken.toml names them"
        raise UserError(f"launch.priority = {priority!r} is not one of this site's ({known})")
    kind, _, name = site.priorities[priority].partition("=")
    return {**found, kind: name}


def script(spec: JobSpec) -> str:
    """What each of the array's jobs runs: a step, since Slurm tells steps alone that their node is wanted elsewhere."""
    step = ["srun", "--quiet", "--kill-on-bad-exit=0"]
    if spec.needs.num_cpus:
        step.append(f"--cpus-per-task={spec.needs.num_cpus}")  # a step does not inherit it
    node = (sys.executable, "-P", "-m", "infra.slurm.node", spec.key, *spec.command)
    return f"#!/bin/sh\nexec {shlex.join([*step, *node])}\n"
