"""Who has which shard: whoever has it keeps it, replicas lie apart, and the load is even."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from training.servers.placement import may_go_on, place

HOLDINGS = st.lists(st.dictionaries(st.integers(0, 3), st.integers(-1, 5)), min_size=1, max_size=6)


@given(HOLDINGS, st.integers(1, 4), st.integers(1, 3))
def test_every_shard_has_its_replicas_and_the_farthest_is_its_primary(
    holdings: Sequence[dict[int, int]], num_shards: int, num_replicas: int
) -> None:
    found = place(num_shards, num_replicas, holdings=holdings, nodes=range(len(holdings)))
    assert len(found) == num_shards
    for shard, ranks in enumerate(found):
        assert len(set(ranks)) == len(ranks) == min(num_replicas, len(holdings))
        positions = [holding.get(shard, -1) for holding in holdings]
        assert positions[ranks[0]] == max(positions)
        holders = {rank for rank, position in enumerate(positions) if position >= 0}
        assert holders <= set(ranks) or set(ranks) <= holders, "who has it keeps it"


def test_a_new_group_shares_the_load_and_puts_replicas_on_different_nodes() -> None:
    nodes = [0, 0, 1, 1]
    found = place(4, 2, holdings=[{}] * 4, nodes=nodes)
    assert all(nodes[primary] != nodes[backup] for primary, backup in found)
    assert Counter(primary for primary, _ in found) == Counter(range(4))


def test_on_one_node_replicas_lie_in_different_processes() -> None:
    assert place(1, 2, holdings=[{}, {}], nodes=[0, 0]) == ((0, 1),)


def test_a_shard_that_was_left_behind_is_none() -> None:
    assert may_go_on([14, 14], 7)
    assert may_go_on([15, 16], 7)
    assert may_go_on([16, 16], 7)
    assert not may_go_on([6, 14], 7), "its copy was on the way when the primary died"
    assert not may_go_on([-1, 14], 7)
    assert not may_go_on([18, 18], 7)
