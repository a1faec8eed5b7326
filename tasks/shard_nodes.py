"""Sharding on the engine's nodes. What comes of it is found by the stage itself, which does what is missing."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from infra.launcher import JobSpec, JobState, Launcher, Needs
from tasks.nodes import Nodes
from training.config import Preset
from training.data.writer_node import Sharing, node_command, sharing_key, store_sharing
from training.documents import digest_of
from training.runs.job import agent_environment
from training.s3.objectstore import Store

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5


def write_on_nodes(launcher: Launcher, store: Store, preset: Preset, *, owner: str | None) -> None:
    """Until every node has ended, one way or another. Ends the job if this process is told to stop, and no other owner
    has asked for it."""
    launch, location = preset.launch, store.location
    sharing = Sharing(preset=preset, location=location, num_nodes=launch.shard_nodes)
    digest = store_sharing(store, sharing)
    key = digest_of({"sharing": digest})
    spec = JobSpec(
        key=key,
        num_nodes=launch.shard_nodes,
        needs=replace(Needs.of(launch), num_gpus=0),
        command=node_command(preset.data.name, digest),
        environment=agent_environment(location),
        store=location.uri(),
        owner=owner,
    )
    nodes = Nodes(launcher, key)
    maybe_canceller = None if owner is None else {owner}
    launcher.submit(spec)
    try:
        while (status := launcher.find(key)) is not None and status.state is not JobState.ENDED:
            nodes.show(status)
            time.sleep(LOOK_SECONDS)
        nodes.show(status)
        maybe_canceller = None
    finally:
        if launcher.cancel(key, by=maybe_canceller):
            store.delete(sharing_key(preset.data.name, digest))
