"""The ranks of a replica, as one of them sees them: those with the other stages of the model, and those with the other
parts of its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from training.connections import Connections
from training.errors import UserError
from training.layout import Layout
from training.parallel.scatter import own_group


@dataclass(frozen=True, kw_only=True)
class ReplicaGroups:
    """This rank's. Two are of those that have the other parts of the same matrices: one for within virtual workers, and
    one for between them, which is left if a rank has cut the other's connections."""

    stages: dist.ProcessGroup
    """The other stages' ranks with the same part of their matrices."""
    computing: dist.ProcessGroup
    settling: dist.ProcessGroup
    whole: dist.ProcessGroup
    """All of the replica: stage after stage, and of each part after part."""
    replicas: dist.ProcessGroup
    """Of this rank's stage and part."""
    connections: Connections
    """For `computing`."""


def make_replica_groups(layout: Layout, rank: int, *, timeout: timedelta) -> ReplicaGroups:
    """Collective over all ranks. A rank that is gone is noticed after `timeout` at the latest. Raises `UserError` for a
    layout in shards."""
    if layout.shard > 1:
        raise UserError(
            f"parallel: {layout}: stages of a pipeline and parts of matrices go with data, and with one another: set"
            " parallel.shard to 1"
        )
    connections = Connections()
    with connections.opening():
        computing = own_group(layout, "tensor", rank=rank, timeout=timeout)
    return ReplicaGroups(
        stages=own_group(layout, "pipeline", rank=rank, timeout=timeout),
        computing=computing,
        settling=own_group(layout, "tensor", rank=rank, timeout=timeout),
        whole=own_group(layout, "pipeline", "tensor", rank=rank, timeout=timeout),
        replicas=own_group(layout, "data", rank=rank, timeout=timeout),
        connections=connections,
    )
