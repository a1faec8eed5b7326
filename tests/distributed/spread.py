"""Whole runs with a part of the state on each rank: what the tests of each way to spread it share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial

from tests.distributed.groups import Act, Group, Node, make_node
from tests.servers.modes import has_checkpoint
from training.cluster.zygote import Zygote
from training.config import ParallelConfig, Preset
from training.recipe import Recipe
from training.runs.record import Departure
from training.s3.objectstore import Store


def in_mode(node: Node, parallel: ParallelConfig) -> None:
    """How the groups from here on do it."""
    node.job = replace(node.job, preset=replace(node.job.preset, parallel=parallel))


def kill(node: Node, victim: int, *, checkpoint: int) -> Act:
    """A rank that is paused, once there is that checkpoint."""
    return partial(_kill, node=node, victim=victim, checkpoint=checkpoint)


async def _kill(group: Group, *, node: Node, victim: int, checkpoint: int) -> None:
    await group.paused(victim)
    await has_checkpoint(node, checkpoint)
    group.kill(victim)


def departure_of(
    store: Store, zygote: Zygote, preset: Preset, recipe: Callable[..., Recipe], fails: str, *, num_ranks: int
) -> Departure:
    """Why a run ends of a recipe that `fails` so."""
    preset = replace(preset, hyperparameters={"fails": fails})
    with closing(make_node(store, zygote, preset, recipe(fails=fails))) as node:
        found = node.train(num_ranks).ended.result().maybe_departure
    assert found is not None
    return found
