"""What the ranks of test_dedicated.py do. Imported by spawned processes: no fixtures, no assertions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.work import trainer_of
from training.control import Order
from training.servers.colocated import Colocated

TRAIN = {"strategy": "parameter_server", "virtual_workers": 8, "batch_size": 32, "clip_norm": 0.5}
NUM_STEPS = 4


def train(rank: int, world_size: int, recipe_name: str, launch: dict[str, Any], *, asks_at: int | None) -> Any:
    """Some steps of a group whose ranks are of a node each. The last rank wants the group to end in step `asks_at`."""
    trainer = trainer_of(recipe_name, rank, world_size, TRAIN)
    preset = replace(trainer.preset, launch=replace(trainer.preset.launch, nodes=world_size, **launch))
    servers = Colocated(trainer.recipe, preset, address="127.0.0.1", secret="s")
    trainer = trainer_of(recipe_name, rank, world_size, TRAIN, launch=preset.launch, servers=servers)
    servers.can_go_on(None, nodes=range(world_size))
    servers.begin(trainer.state, token=1, rank=rank)
    wishes = []
    for step in range(NUM_STEPS):
        if step == asks_at and rank == world_size - 1:
            trainer.handover.take_order(Order(do="regroup"))
        wishes.append(trainer.train_step().control.regroup)
    with trainer.whole_state():
        state = trainer.state.state_sha256()
    dist.all_reduce(torch.zeros(1))  # nobody goes while another asks him
    return {
        "state": state,
        "history": [entry.values["loss"] for entry in trainer.handover.journal],
        "computes": len(trainer.reducer.owned),
        "shards": len(servers._hosted),
        "wishes": wishes,
    }


def train_dedicated(rank: int, world_size: int, recipe_name: str, server_nodes: int, asks_at: int | None) -> Any:
    launch = {"server_nodes": server_nodes, "servers": 3, "server_replicas": min(2, max(1, server_nodes))}
    return train(rank, world_size, recipe_name, launch, asks_at=asks_at)
