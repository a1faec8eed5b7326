"""Which rank stands where, and what a layout costs."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from training.arithmetic.reduce import owned_range
from training.errors import UserError
from training.layout import OUTER_TO_INNER, Coordinates, Layout, Schedule, in_shards, in_stages, layouts
from training.parallel.plan import ModelCost, Part, cost, costs, recommended
from training.parallel.schedule import bubble, num_in_flight

BLOCK = Part(weight_bytes=1000, optimizer_bytes=2000, saved_bytes=500, output_bytes=10)
MODEL = ModelCost(
    parts=(
        Part(weight_bytes=300, optimizer_bytes=600, saved_bytes=20, output_bytes=10),
        *(BLOCK,) * 8,
        Part(weight_bytes=200, optimizer_bytes=400, saved_bytes=70, output_bytes=0),
    )
)


def test_ranks_and_coordinates_are_one_another_s_inverse() -> None:
    layout = Layout(data=2, shard=3, pipeline=2, tensor=2)
    found = [layout.coordinates(rank) for rank in range(layout.num_ranks)]
    assert layout.num_ranks == 24
    assert len(set(found)) == 24
    assert [layout.rank_of(at) for at in found] == list(range(24))
    assert found[0] == Coordinates()
    assert found[-1] == Coordinates(data=1, shard=2, pipeline=1, tensor=1)


def test_groups_hold_each_rank_once_and_differ_in_their_dimension_alone() -> None:
    layout = Layout(data=2, shard=3, pipeline=2, tensor=2)
    for dimension in OUTER_TO_INNER:
        groups = layout.groups(dimension)
        assert sorted(rank for group in groups for rank in group) == list(range(24))
        for group in groups:
            places = [layout.coordinates(rank) for rank in group]
            assert [getattr(at, dimension) for at in places] == list(range(getattr(layout, dimension)))
            assert len({replace(at, **{dimension: 0}) for at in places}) == 1
    assert Layout(data=2, shard=2).groups("shard") == ((0, 1), (2, 3))
    assert Layout(data=2, shard=2).group_of(3, "data") == (1, 3)
    assert Layout(data=2, shard=2, pipeline=2).groups("data", "shard") == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_stages_of_a_pipeline_have_the_same_virtual_workers_and_all_are_computed() -> None:
    layout = Layout(data=2, shard=2, pipeline=2)
    feeds = [layout.feed_of(rank) for rank in range(8)]
    assert [feeds[group[0]] for group in layout.groups("pipeline")] == [0, 1, 2, 3]
    assert all(len({feeds[rank] for rank in group}) == 1 for group in layout.groups("pipeline"))
    assert [w for feed in range(4) for w in owned_range(feed, layout.num_feeds, 6)] == list(range(6))


def test_what_is_left_goes_on_in_as_many_shards_as_divide_both() -> None:
    assert [in_shards(num_ranks, 2) for num_ranks in (4, 3, 2, 1)] == [
        Layout(data=2, shard=2),
        Layout(data=3),
        Layout(shard=2),
        Layout(),
    ]
    assert in_shards(6, 4) == Layout(data=3, shard=2)


def test_what_is_left_goes_on_in_the_most_stages_that_divide_it() -> None:
    assert [in_stages(num_ranks, 4) for num_ranks in (8, 7, 6, 3, 1)] == [
        Layout(data=2, pipeline=4),
        Layout(data=7),
        Layout(data=2, pipeline=3),
        Layout(pipeline=3),
        Layout(),
    ]


def test_a_replica_more_or_less() -> None:
    assert Layout(data=3, shard=2).over(4) == Layout(data=2, shard=2)
    with pytest.raises(UserError, match=r"5 are no multiple of 2: change launch\.nodes"):
        Layout(data=3, shard=2).over(5)


def test_errors_name_the_field() -> None:
    with pytest.raises(UserError, match=r"parallel\.shard = 0: must be at least 1"):
        Layout(shard=0)
    with pytest.raises(UserError, match=r"data 2 × shard 2 is for 4 ranks, and .* = 3: set parallel\.data"):
        Layout(data=2, shard=2).require(num_ranks=3, virtual_workers=8)
    with pytest.raises(UserError, match=r"= 4, more than train\.virtual_workers = 3"):
        Layout(data=2, shard=2).require(num_ranks=4, virtual_workers=3)
    with pytest.raises(UserError, match="rank 4 is none of the 4"):
        Layout(data=2, shard=2).coordinates(4)
    Layout(data=2, shard=2).require(num_ranks=4, virtual_workers=4)


def test_all_layouts_of_some_ranks() -> None:
    found = list(layouts(8, max_pipeline=4, max_tensor=2, max_feeds=8))
    assert found[0] == Layout(data=8)
    assert len(set(found)) == len(found) == 15
    assert all(one.num_ranks == 8 for one in found)
    assert [one.data for one in layouts(6, max_feeds=6)] == [6, 3, 2, 1]
    assert list(layouts(8, max_feeds=4)) == []


@pytest.mark.parametrize(
    ("schedule", "share"), [("gpipe", Fraction(3, 11)), ("1f1b", Fraction(3, 11)), ("interleaved", Fraction(3, 19))]
)
def test_bubbles(schedule: Schedule, share: Fraction) -> None:
    assert bubble(schedule, num_stages=4, num_microbatches=8) == share
    assert bubble(schedule, num_stages=1, num_microbatches=8) == 0


def test_what_stages_keep() -> None:
    about = {"num_stages": 4, "num_microbatches": 8}
    assert [num_in_flight("gpipe", stage=stage, **about) for stage in range(4)] == [8] * 4
    assert [num_in_flight("1f1b", stage=stage, **about) for stage in range(4)] == [4, 3, 2, 1]
    assert [2 * num_in_flight("interleaved", stage=stage, **about) for stage in range(4)] == [11, 9, 7, 5]
    assert num_in_flight("1f1b", stage=0, num_stages=4, num_microbatches=2) == 2


def test_stages_are_cut_between_blocks() -> None:
    sizes = [[part.weight_bytes for part in stage] for stage in MODEL.stages(3)]
    assert sizes == [[300, 1000, 1000], [1000] * 3, [1000] * 3 + [200]]
    assert MODEL.stages(1) == [MODEL.parts]
    assert MODEL.max_stages == 8
    assert ModelCost(parts=(BLOCK,)).max_stages == 1


def test_what_layouts_cost() -> None:
    one = cost(MODEL, Layout(), None, virtual_workers=8)
    assert (one.weight_bytes, one.optimizer_bytes, one.sent_bytes, one.bubble) == (8500, 17000, 0, 0.0)
    assert one.gradient_bytes == 4 * 8500  # of the backward pass, and three levels of a tree of eight
    assert one.activation_bytes == 4090
    pair = cost(MODEL, Layout(data=2), None, virtual_workers=2)
    assert (pair.gradient_bytes, pair.sent_bytes) == (2 * 8500, 8500)  # as any all-reduce of two
    sharded = cost(MODEL, Layout(shard=4), None, virtual_workers=4)
    assert (sharded.weight_bytes, sharded.optimizer_bytes) == (8500 // 4 + 2000, 17000 // 4)
    assert sharded.gradient_bytes == 8500 // 4 + 2000
    assert sharded.sent_bytes == 3 * 8500 * 3 // 4  # gathered twice, scattered once
    several = cost(MODEL, Layout(shard=2), None, virtual_workers=4)
    assert several.gradient_bytes == 8500 // 2 + 8500 + 2000, "of two siblings, and of a block on its way"
    piped = cost(MODEL, Layout(pipeline=4), "1f1b", virtual_workers=8)
    assert piped.bubble == pytest.approx(3 / 11)
    assert piped.weight_bytes == 2300  # of the first stage, which keeps most
    assert piped.activation_bytes == 4 * (20 + 2 * 500)


def test_matrices_are_cut_where_the_recipe_lets_them() -> None:
    half = replace(BLOCK, weight_bytes=550, optimizer_bytes=1100, saved_bytes=250, exchanged_bytes=40)
    model = replace(MODEL, cut={2: (MODEL.parts[0], *(half,) * 8, MODEL.parts[-1])})
    found = {str(one.layout): one for one in costs(model, num_ranks=4, virtual_workers=4) if one.schedule is None}
    assert {"data 4", "data 2 × tensor 2", "shard 2 × tensor 2"} <= found.keys()
    assert "tensor 4" not in found
    both = found["data 2 × tensor 2"]
    weights = 500 + 8 * 550
    assert (both.weight_bytes, both.optimizer_bytes, both.activation_bytes) == (weights, 2 * weights, 90 + 8 * 250)
    assert both.sent_bytes == 2 * 8 * 40 + weights, "of two virtual workers, and as any all-reduce of two"
    assert all(one.layout.tensor == 1 for one in costs(MODEL, num_ranks=4, virtual_workers=4))


def test_a_layout_is_recommended_that_fits() -> None:
    found = costs(MODEL, num_ranks=4, virtual_workers=4)
    names = {(str(one.layout), one.schedule) for one in found}
    assert {("data 4", None), ("shard 4", None), ("data 2 × shard 2", None), ("pipeline 4", "interleaved")} <= names
    uneven = {(str(one.layout), one.schedule) for one in costs(MODEL, num_ranks=4, virtual_workers=6)}
    assert ("pipeline 4", "1f1b") in uneven
    assert ("pipeline 4", "interleaved") not in uneven, "six microbatches are no whole rounds of four"
    assert recommended(found, memory_bytes=None).layout == Layout(data=4)
    needed = next(one.memory_bytes for one in found if one.layout == Layout(data=4))
    assert recommended(found, memory_bytes=needed).layout == Layout(data=4)
    tight = recommended(found, memory_bytes=needed - 1)
    assert tight.layout.data < 4
    assert tight.memory_bytes < needed
    assert costs(MODEL, num_ranks=4, virtual_workers=3) == [], "a stage has a microbatch at least"
    assert recommended(found, memory_bytes=1) == min(found, key=lambda one: one.memory_bytes)
