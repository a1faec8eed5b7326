"""Which ranks of a group have the replicas of which shard: a pure function of what they hold and where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def num_computing(nodes: Sequence[int], num_server_nodes: int) -> int:
    """How many ranks, the first ones, compute: those of the last nodes have servers alone. `nodes` has the node of each
    rank; ranks of one are neighbours. One node computes, however few there are."""
    order = list(dict.fromkeys(nodes))
    serving = set(order[max(1, len(order) - num_server_nodes) :])
    return sum(node not in serving for node in nodes)


def place(
    num_shards: int,
    num_replicas: int,
    *,
    holdings: Sequence[Mapping[int, int]],
    nodes: Sequence[int],
    hosts: Sequence[int],
) -> tuple[tuple[int, ...], ...]:
    """Of each shard, the ranks that have a replica, the primary first.

    `holdings` are, for each rank, how far its replica of a shard has come (training.servers.protocol), by the shard's
    number; `nodes` the node of each rank; `hosts` the ranks that shall have replicas. Who of these has a shard keeps
    it, the farthest first; others are added on other nodes if there are, where there are fewest. If another rank is
    ahead of all of them, it has the shard too, until the next group. The primary is one of the farthest.
    """
    num_replicas = min(num_replicas, len(hosts))
    counts, num_primaries = [0] * len(holdings), [0] * len(holdings)
    found = []
    for shard in range(num_shards):
        positions = [holding.get(shard, -1) for holding in holdings]
        chosen = _chosen(num_replicas, positions, counts, nodes, hosts)
        farthest = max(positions[rank] for rank in chosen)
        primary = min((num_primaries[rank], rank) for rank in chosen if positions[rank] == farthest)[1]
        num_primaries[primary] += 1
        for rank in chosen:
            counts[rank] += 1
        found.append((primary, *(rank for rank in chosen if rank != primary)))
    return tuple(found)


def may_go_on(farthest: Sequence[int], step: int) -> bool:
    """Whether shards whose best replicas are so far belong to ranks that have finished that step: none is behind, and
    none further than the step after, which the ranks compute again, and who has applied it drops it."""
    return min(farthest) >= 2 * step and max(farthest) // 2 <= step + 1


def _chosen(
    num_replicas: int, positions: Sequence[int], counts: Sequence[int], nodes: Sequence[int], hosts: Sequence[int]
) -> list[int]:
    holders = sorted((rank for rank in hosts if positions[rank] >= 0), key=lambda rank: (-positions[rank], rank))
    chosen = holders[:num_replicas]
    while len(chosen) < num_replicas:
        taken = {nodes[rank] for rank in chosen}
        others = [rank for rank in hosts if rank not in chosen]
        chosen.append(min(others, key=lambda rank: (nodes[rank] in taken, counts[rank], rank)))
    farthest = max(positions)
    return chosen if max(positions[rank] for rank in chosen) == farthest else [positions.index(farthest), *chosen]
