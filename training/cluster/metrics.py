"""What a node agent serves at /metrics: its ranks, its part in the group, its machine. docs/monitoring.md lists all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.cluster.machine import add_machine
from training.cluster.node import Node
from training.cluster.workers import RankSight
from training.runs.exposition import Labels, Page

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Below those that the kernel gives away."""
COUNTED = {
    "steps": ("steps_total", "Steps finished in this group"),
    "samples": ("samples_total", "Samples that the rank computed in this group"),
    "outside_seconds": ("outside_seconds_total", "Time in steps outside of collectives"),
    "pace_seconds": ("pace_seconds_total", "The same, if all ranks had as many virtual workers"),
    "collective_seconds": ("collective_seconds_total", "Time in steps waiting for other ranks"),
    "data_wait_seconds": ("data_wait_seconds_total", "Time waiting for samples"),
    "checkpoint_seconds": ("checkpoint_seconds_total", "What checkpoints held the training up"),
    "checkpoint_bytes": ("checkpoint_bytes_total", "Bytes of the rank's parts of checkpoints"),
    "losses_not_finite": ("losses_not_finite_total", "Losses or gradients that were NaN or infinite"),
    "loss": ("loss", "Of the last finished step"),
}


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A node at one moment. Times are the event loop's."""

    run_key: str
    num_goal_steps: int
    node: Node
    ranks: Sequence[RankSight]
    now: float
    wall_time: float
    """The same moment, in seconds since 1970."""
    moved_at: float
    """When a rank of this node last finished a step; or when the agent began."""
    num_groups: int
    """That this agent was in."""
    departures: Mapping[str, int]
    """By class."""


def page_of(situation: Situation) -> str:
    labels = {"run": short(situation.run_key), "node": str(situation.node.me.node)}
    page = Page()
    for rank in situation.ranks:
        _add_rank(page, {**labels, "rank": str(rank.rank)}, rank, situation.wall_time)
    _add_node(page, labels, situation)
    add_machine(page, labels)
    return page.text()


def _add_rank(page: Page, labels: Labels, rank: RankSight, wall_time: float) -> None:
    def add(name: str, value: float, help: str) -> None:
        page.add(f"unbroken_rank_{name}", value, help, labels)

    add("step", rank.step, "The last finished step")
    add("heard_timestamp_seconds", wall_time - rank.silent_seconds, "When the rank last gave a sign of life")
    add("step_timestamp_seconds", wall_time - rank.seconds_since_step, "When it last finished a step")
    for figure, (name, help) in COUNTED.items():
        if figure in rank.figures:
            add(name, rank.figures[figure], help)
    if rank.figures.get("checkpoint_time"):
        add("checkpoint_step", rank.figures["checkpoint_step"], "The last that it had the run record name")
        add("checkpoint_timestamp_seconds", rank.figures["checkpoint_time"], "When that was")


def _add_node(page: Page, labels: Labels, situation: Situation) -> None:
    def add(name: str, value: float, help: str) -> None:
        page.add(f"unbroken_node_{name}", value, help, labels)

    node = situation.node
    group = node.maybe_group.num_nodes if node.maybe_group and node.phase == "training" else 0
    add("training", node.phase == "training", "1 while the node is in a group")
    add("token", node.maybe_record.token if node.maybe_record else 0, "The run's fencing token, as the node knows it")
    add("group_nodes", group, "Nodes of the group that this one trains in; 0 outside of one")
    add("wanted_nodes", node.num_nodes, "Nodes that the run asked for")
    add("goal_steps", situation.num_goal_steps, "Steps that the run is to make")
    add("sees_store", node.sees_store, "1 if the store answered last")
    add("peers", len(node.peers), "Other nodes that this one hears")
    add("groups_total", situation.num_groups, "Groups that this agent was in")
    moved = situation.wall_time - (situation.now - situation.moved_at)
    add("step_timestamp_seconds", moved, "When a rank of the node last finished a step, or the agent began")
    for class_name, number in situation.departures.items():
        help = "Groups that the node left by a failure, by its class"
        page.add("unbroken_node_departures_total", number, help, {**labels, "class": class_name})


def short(run_key: str) -> str:
    """As people see it everywhere."""
    return run_key[:12]


def usual_port(run_key: str, node: int) -> int:
    """So that a restarted agent serves where it did before, if nobody else took that port."""
    digest = hashlib.sha256(f"{run_key}/{node}".encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:4]) % NUM_PORTS
