"""A model in stages, on two to four real ranks: the bits of one process, over a whole training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pipelining import other_forms, pipelined, tensors_of_all_kinds
from tests.distributed.ranks import RankPool
from training.layout import Layout, Schedule

MAX_RANKS = 4
NUM_STEPS = 50
TRAIN = {"virtual_workers": 6, "batch_size": 12}
Case = tuple[str, Layout, Schedule]
CASES: list[Case] = [
    ("transformer", Layout(pipeline=2), "gpipe"),
    ("transformer", Layout(pipeline=4), "1f1b"),
    ("noisy", Layout(pipeline=2), "interleaved"),
    ("noisy", Layout(data=2, pipeline=2), "1f1b"),
]
MORE_CASES: list[Case] = [
    ("noisy", Layout(data=2, pipeline=2), "interleaved"),
    ("transformer", Layout(pipeline=2), "1f1b"),
    ("transformer", Layout(pipeline=4), "gpipe"),
    ("transformer", Layout(pipeline=3), "1f1b"),
    ("transformer", Layout(pipeline=2), "interleaved"),
    ("transformer", Layout(data=2, pipeline=2), "gpipe"),
    ("transformer", Layout(data=2, pipeline=2), "1f1b"),
    ("noisy", Layout(pipeline=2), "gpipe"),
    ("noisy", Layout(pipeline=2), "1f1b"),
    ("noisy", Layout(pipeline=3), "1f1b"),
    ("noisy", Layout(pipeline=4), "gpipe"),
    ("noisy", Layout(pipeline=4), "1f1b"),
    ("noisy", Layout(data=2, pipeline=2), "gpipe"),
]


def named(case: Case) -> str:
    recipe, layout, schedule = case
    return f"{recipe}, {layout}, {schedule}"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(MAX_RANKS, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, dict[str, Any]]:
    """What one process makes of each recipe."""
    return {recipe: in_layout(ranks, recipe, None, "1f1b", TRAIN, NUM_STEPS)[0] for recipe in ("transformer", "noisy")}


def in_layout(
    ranks: RankPool, recipe: str, maybe_layout: Layout | None, schedule: Schedule, *arguments: Any
) -> list[dict[str, Any]]:
    """Of each rank; all must end with the same, step by step."""
    world_size = maybe_layout.num_ranks if maybe_layout else 1
    answers: list[dict[str, Any]] = ranks.run(pipelined, world_size, recipe, maybe_layout, schedule, *arguments)
    for answer in answers:
        assert (answer["state"], answer["history"]) == (answers[0]["state"], answers[0]["history"])
    return answers


def require_bits_of_one_process(ranks: RankPool, alone: dict[str, dict[str, Any]], case: Case) -> None:
    recipe, layout, schedule = case
    one = alone[recipe]
    assert len({loss for loss, _, _ in one["history"]}) == NUM_STEPS
    assert any(norm > 0.5 for _, norm, _ in one["history"]), "something was clipped"
    answers = in_layout(ranks, recipe, layout, schedule, TRAIN, NUM_STEPS)
    assert answers[0]["history"] == one["history"]
    assert answers[0]["state"] == one["state"]
    replica = answers[: layout.pipeline]
    assert sum(answer["num_kept"] for answer in replica) == one["num_of_model"]
    assert all(answer["num_of_optimizer"] <= answer["num_kept"] < one["num_of_model"] for answer in answers)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_pipeline_has_the_bits_of_one_process(ranks: RankPool, alone: dict[str, dict[str, Any]], case: Case) -> None:
    """With AdamW and clipping; random numbers of all kinds, buffers and recomputed activations on all stages. The
    stages' weights make up the whole."""
    require_bits_of_one_process(ranks, alone, case)


@pytest.mark.soak
@pytest.mark.parametrize("case", MORE_CASES, ids=named)
def test_other_pipelines_have_the_bits_of_one_process(
    ranks: RankPool, alone: dict[str, dict[str, Any]], case: Case
) -> None:
    require_bits_of_one_process(ranks, alone, case)


def test_bfloat16_and_an_odd_number_of_workers(ranks: RankPool) -> None:
    train = {"virtual_workers": 5, "batch_size": 10, "precision": "bfloat16"}
    for recipe in ("transformer", "noisy", "wide"):
        (alone,) = in_layout(ranks, recipe, None, "1f1b", train, 5)
        found = in_layout(ranks, recipe, Layout(data=2, pipeline=2), "1f1b", train, 5)[0]
        assert (found["history"], found["state"]) == (alone["history"], alone["state"])


def test_what_is_saved_in_one_layout_goes_on_in_any_other(ranks: RankPool, tmp_path: Path) -> None:
    layouts: list[tuple[Layout | None, Schedule]] = [
        (None, "1f1b"),
        (Layout(pipeline=4), "1f1b"),
        (Layout(pipeline=2), "interleaved"),
        (Layout(data=2, pipeline=2), "gpipe"),
    ]
    (calm,) = in_layout(ranks, "noisy", None, "1f1b", TRAIN, 6)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(len(layouts))]
    for (layout, schedule), file in zip(layouts, files, strict=True):
        in_layout(ranks, "noisy", layout, schedule, TRAIN, 3, None, file)
    assert len({Path(file).read_bytes() for file in files}) == 1
    for layout, schedule in layouts:
        after = in_layout(ranks, "noisy", layout, schedule, TRAIN, 3, files[0])[0]
        assert (after["state"], after["history"]) == (calm["state"], calm["history"][3:])


def test_stages_get_what_was_sent_in_its_place_in_memory(ranks: RankPool) -> None:
    nothing, found = ranks.run(tensors_of_all_kinds, 2)
    assert nothing == []
    assert len(found) == 36
    assert all(found)


def test_microbatches_of_other_shapes_and_failed_ones_arrive_as_what_they_are(ranks: RankPool) -> None:
    assert ranks.run(other_forms, 2)[1] == [[2, 3], None, [2, 3], [3, 3]]
