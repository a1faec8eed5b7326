"""Who has which shard: whoever has it keeps it, replicas lie apart, and the load is even."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from training.servers.placement import may_go_on, num_computing, place

HOLDINGS = st.lists(st.dictionaries(st.integers(0, 3), st.integers(-1, 5)), min_size=1, max_size=6)


def placed(num_shards: int, num_replicas: int, holdings: Sequence[dict[int, int]], nodes: Sequence[int]) -> Any:
    """Where all ranks may have servers."""
    return place(num_shards, num_replicas, holdings=holdings, nodes=nodes, hosts=range(len(nodes)))


@given(HOLDINGS, st.integers(1, 4), st.integers(1, 3))
def test_every_shard_has_its_replicas_and_the_farthest_is_its_primary(
    holdings: Sequence[dict[int, int]], num_shards: int, num_replicas: int
) -> None:
    found = placed(num_shards, num_replicas, holdings, range(len(holdings)))
    assert len(found) == num_shards
    for shard, ranks in enumerate(found):
        assert len(set(ranks)) == len(ranks) == min(num_replicas, len(holdings))
        positions = [holding.get(shard, -1) for holding in holdings]
        assert positions[ranks[0]] == max(positions)
        holders = {rank for rank, position in enumerate(positions) if position >= 0}
        assert holders <= set(ranks) or set(ranks) <= holders, "who has it keeps it"


def test_a_new_group_shares_the_load_and_puts_replicas_on_different_nodes() -> None:
    nodes = [0, 0, 1, 1]
    found = placed(4, 2, [{}] * 4, nodes)
    assert all(nodes[primary] != nodes[backup] for primary, backup in found)
    assert Counter(primary for primary, _ in found) == Counter(range(4))


def test_on_one_node_replicas_lie_in_different_processes() -> None:
    assert placed(1, 2, [{}, {}], [0, 0]) == ((0, 1),)


@given(HOLDINGS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_servers_are_where_they_shall_be_and_whatever_is_farthest_is_kept(
    holdings: Sequence[dict[int, int]], num_shards: int, num_replicas: int, first_host: int
) -> None:
    hosts = range(min(first_host, len(holdings) - 1), len(holdings))
    found = place(num_shards, num_replicas, holdings=holdings, nodes=range(len(holdings)), hosts=hosts)
    for shard, ranks in enumerate(found):
        positions = [holding.get(shard, -1) for holding in holdings]
        assert positions[ranks[0]] == max(positions)
        others = [rank for rank in ranks if rank not in hosts]
        assert len(set(ranks) & set(hosts)) == min(num_replicas, len(hosts))
        assert others in ([], [ranks[0]]), "one rank that computes, if it is ahead of all hosts"
        assert not others or max(positions[rank] for rank in hosts) < max(positions)


def test_the_last_nodes_compute_nothing_but_one_does() -> None:
    assert num_computing([0, 0, 1, 1, 2, 2], 0) == 6
    assert num_computing([0, 0, 1, 1, 2, 2], 1) == 4
    assert num_computing([0, 3, 5], 2) == 1
    assert num_computing([4, 4], 2) == 2, "all others are gone"
    assert num_computing([4, 7], 2) == 1


def test_a_shard_that_was_left_behind_is_none() -> None:
    assert may_go_on([14, 14], 7)
    assert may_go_on([15, 16], 7)
    assert may_go_on([16, 16], 7)
    assert not may_go_on([6, 14], 7), "its copy was on the way when the primary died"
    assert not may_go_on([-1, 14], 7)
    assert not may_go_on([18, 18], 7)
