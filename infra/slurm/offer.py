"""What the cluster has, for somebody whose job does not fit it."""

from __future__ import annotations

from infra.slurm.commands import Commands, Refusal
from training.errors import InfrastructureError

COLUMNS = "%R|%a|%D|%c|%m|%G|%l"


def what_would_fit(commands: Commands) -> str:
    """One line per kind of node of each partition."""
    try:
        lines = commands.run("sinfo", "--noheader", "--format", COLUMNS).splitlines()
    except (InfrastructureError, Refusal):  # the refusal that it is to explain says more than this
        return "what the cluster has could not be found out: see `sinfo`"
    return "\n".join(["what the cluster has:", *map(_describe, lines)])


def _describe(line: str) -> str:
    fields = line.strip().split("|")
    if len(fields) != COLUMNS.count("|") + 1:
        return f"  {line.strip()}"
    partition, availability, num_nodes, num_cpus, mebibytes, gres, limit = fields
    gpus = "no GPU" if gres == "(null)" else gres.partition("(")[0]
    return (
        f"  partition {partition} ({availability}): {num_nodes} nodes, each with {num_cpus} CPUs, {mebibytes} MiB and"
        f" {gpus}, for at most {limit}"
    )
