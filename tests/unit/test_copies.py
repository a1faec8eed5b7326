"""Which copies of a state in parts make it whole, and where they are kept."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from training.layout import Layout
from training.memory.copies import Complete, Part, distance, named, newest_complete, parts_in
from training.memory.handover import Handover
from training.memory.slots import Slots


@pytest.mark.parametrize(
    ("layout", "processes_per_node", "expected"),
    [
        (Layout(shard=2), 1, 1),
        (Layout(shard=4), 2, 2),
        (Layout(shard=2), 2, 0),
        (Layout(shard=4, data=2), 2, 0),
        (Layout(shard=2, data=2), 2, 0),
        (Layout(shard=3, data=2), 2, 0),
        (Layout(shard=2, data=4), 4, 0),
        (Layout(shard=2, data=3), 2, 0),
        (Layout(shard=4, data=2), 1, 0),
        (Layout(shard=4, data=2), 8, 0),
        (Layout(shard=8), 4, 4),
        (Layout(), 1, 0),
    ],
)
def test_a_part_is_on_two_nodes_if_there_are_two(layout: Layout, processes_per_node: int, expected: int) -> None:
    far = distance(layout, processes_per_node)
    assert far == expected
    nodes: dict[int, set[int]] = {}
    for rank in range(layout.num_ranks):
        places = nodes.setdefault(layout.coordinates(rank).shard, set())
        places |= {rank // processes_per_node, (rank + far) % layout.num_ranks // processes_per_node}
    num_nodes = layout.num_ranks // processes_per_node
    assert all(len(places) >= min(2, num_nodes) for places in nodes.values())


def test_the_newest_step_of_which_all_parts_are_there() -> None:
    first, second, alone = Part(2, 0), Part(2, 1), Part(1, 0)
    assert newest_complete([[], []]) is None
    assert newest_complete([[(4, [first])], [(2, [first, second])]]) == Complete(step=2, holders=[1, 1])
    assert newest_complete([[(4, [first]), (2, [first])], [(4, [second])]]) == Complete(step=4, holders=[0, 1])
    assert newest_complete([[(6, [first])], [(4, [alone])], [(4, [alone])]]) == Complete(step=4, holders=[1])
    assert newest_complete([[(6, [first])], [(6, [Part(3, 1)])], [(6, [Part(3, 2)])]]) is None, "of other numbers"


def test_two_generations_are_kept(slots: Slots) -> None:
    handover = Handover(slots, run_key="key", generation=1)
    tensors = named(Part(2, 1), {"7|model.weight": torch.arange(3.0)}) | named(Part(2, 0), {})
    for step in range(1, 7):
        handover.note(step, {})
        if step % 2 == 0:
            handover.put_copy(tensors)
    newest, older = handover.copies(since=0)
    assert (newest.step, older.step) == (6, 4)
    found = parts_in(newest)
    assert found.keys() == {Part(2, 0), Part(2, 1)}
    assert found[Part(2, 0)] == {}, "and it is there"
    assert found[Part(2, 1)]["7|model.weight"].tolist() == [0.0, 1.0, 2.0]
    assert Handover(slots, run_key="key", generation=2).copies(since=0) == []
    assert [held.step for held in handover.copies(since=5)] == [6]


def test_newer_copies_stay_until_the_group_makes_its_own(slots: Slots) -> None:
    """One that ends before that leaves them to the next, which may have all parts."""
    tensors = named(Part(2, 1), {"|step": torch.tensor(5)})

    def group(begins_at: int, *steps: int) -> Handover:
        handover = Handover(slots, run_key="key", generation=1)
        handover.begin_at(begins_at)
        for step in steps:
            handover.step = step
            handover.put_copy(tensors)
        return handover

    def steps_in_memory() -> list[int]:
        return [held.step for held in slots.whole("key", 1)]

    group(0, 8, 10)
    group(5)
    assert steps_in_memory() == [10, 8], "it never came to a copy"
    group(8, 9)
    assert steps_in_memory() == [9, 8], "where it began is whole while it writes"
    group(5, 6)
    assert steps_in_memory() == [6]
    group(6, 8, 10)
    assert steps_in_memory() == [10, 8]


def test_where_a_group_begins_is_whole_until_its_second_copy(slots: Slots) -> None:
    """The first is of the same step, and of other parts, maybe; the second takes the older one's place."""

    def copy(handover: Handover, step: int, part: Part) -> list[tuple[int, Part]]:
        handover.step = step
        handover.put_copy(named(part, {}))
        return [(held.step, *parts_in(held)) for held in slots.whole("key", 1)]

    before, after = (Handover(slots, run_key="key", generation=1) for _ in range(2))
    copy(before, 6, Part(2, 0))
    copy(before, 8, Part(2, 0))
    after.begin_at(8)
    assert sorted(copy(after, 8, Part(2, 1))) == [(8, Part(2, 0)), (8, Part(2, 1))]
    assert copy(after, 10, Part(2, 1)) == [(10, Part(2, 1)), (8, Part(2, 1))]
    assert copy(after, 12, Part(2, 1)) == [(12, Part(2, 1)), (10, Part(2, 1))]


def test_a_copy_for_which_there_is_no_memory_is_left_out(slots: Slots, caplog: pytest.LogCaptureFixture) -> None:
    """The older one is still there, and training goes on."""
    handover = Handover(slots, run_key="key", generation=1)
    tensors = named(Part(1, 0), {"|step": torch.tensor(5)})
    handover.note(1, {})
    handover.put_copy(tensors)
    handover.note(2, {})
    with mock.patch("os.ftruncate", side_effect=OSError("no memory")) as failing:
        handover.put_copy(tensors)
    assert failing.called
    assert "there is no copy in memory of step 2" in caplog.text
    assert [held.step for held in handover.copies(since=0)] == [1]
