"""Whether this machine has what a job asks for. The local engine has no queue: what will never fit is refused."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from infra.launcher import JobSpec
from training.errors import UserError

DEVICES = Path("/dev")


def require_room(spec: JobSpec) -> None:
    """Raises `UserError` naming the field. Nodes share the CPUs; memory and GPUs are taken by each."""
    needs, num_nodes = spec.needs, spec.num_nodes
    if needs.priority:
        raise UserError(f"launch.priority = {needs.priority!r}: the local engine has no queue; leave it out")
    num_gpus = len(list(DEVICES.glob("nvidia[0-9]*")))
    memory = psutil.virtual_memory().total
    for field, asked, num_times, there in (
        ("cpus_per_node", needs.num_cpus, 1, os.cpu_count() or 1),
        ("gpus_per_node", needs.num_gpus, num_nodes, num_gpus),
        ("memory_bytes_per_node", needs.memory_bytes, num_nodes, memory),
    ):
        if asked * num_times > there:
            times = f", {num_times} times," if num_times > 1 else ""
            raise UserError(f"launch.{field} = {asked}{times} is more than this machine has: {there}")
