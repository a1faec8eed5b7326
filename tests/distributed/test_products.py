"""Stages whose matrices are cut, on four real ranks and eight: the bits of as many parts without stages.
(test_layouts.py has whole trainings.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.distributed.giving_up import failing
from tests.distributed.ranks import RankPool
from tests.distributed.tensoring import TRAIN, in_tensors
from training.layout import Layout, Schedule

Case = tuple[str, Layout, Schedule, bool]
NUM_STEPS = 12
NUM_FAILURES = 5
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")
FOUR, EIGHT = Layout(pipeline=2, tensor=2), Layout(data=2, pipeline=2, tensor=2)
CASES: list[Case] = [
    ("deep", FOUR, "gpipe", True),
    ("deep", FOUR, "1f1b", False),
    ("deep, recomputing", FOUR, "interleaved", True),
]
MORE_CASES: list[Case] = [
    ("deep", FOUR, "1f1b", True),
    ("deep", FOUR, "interleaved", False),
    ("deep", EIGHT, "gpipe", False),
    ("deep", EIGHT, "1f1b", True),
    ("deep", EIGHT, "interleaved", True),
    ("deep, recomputing", EIGHT, "1f1b", True),
    ("deep", Layout(pipeline=4, tensor=2), "1f1b", True),
    ("deep", Layout(pipeline=2, tensor=4), "gpipe", True),
]
Run = Callable[[Case], dict[str, Any]]


def named(case: Case) -> str:
    recipe, layout, schedule, in_sequences = case
    return f"{recipe}, {layout}, {schedule}, sequences {'in parts' if in_sequences else 'whole'}"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(4, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


def in_layout(ranks: RankPool, case: Case, train: dict[str, Any], num_steps: int) -> list[dict[str, Any]]:
    """Of each rank; all must end with the same, step by step."""
    recipe, layout, schedule, in_sequences = case
    about = (recipe, layout, in_sequences, train, num_steps, None, None, "none", schedule)
    answers: list[dict[str, Any]] = ranks.run(in_tensors, layout.num_ranks, *about)
    for answer in answers:
        assert (answer["state"], answer["history"]) == (answers[0]["state"], answers[0]["history"])
    return answers


def without_stages(case: Case) -> Case:
    _, layout, _, in_sequences = case
    return "deep", Layout(tensor=layout.tensor), "1f1b", in_sequences


@pytest.fixture(scope="module")
def of_parts(ranks: RankPool) -> Run:
    """What as many parts make of it without stages, once."""
    found: dict[Case, dict[str, Any]] = {}

    def run(case: Case) -> dict[str, Any]:
        if case not in found:
            found[case] = in_layout(ranks, case, TRAIN, NUM_STEPS)[0]
        return found[case]

    return lambda case: run(without_stages(case))


def require_bits_of_parts(ranks: RankPool, of_parts: Run, case: Case) -> None:
    _, layout, *_ = case
    one = of_parts(case)
    assert len({loss for loss, _, _ in one["history"]}) == NUM_STEPS
    assert any(norm > 0.5 for _, norm, _ in one["history"]), "something was clipped"
    answers = in_layout(ranks, case, TRAIN, NUM_STEPS)
    assert answers[0]["history"] == one["history"]
    assert answers[0]["state"] == one["state"]
    assert answers[0]["loss_alone"] == one["loss_alone"], "whole weights compute by themselves"
    replica = answers[: layout.pipeline * layout.tensor]
    assert sum(answer["num_kept"] for answer in replica) == layout.tensor * one["num_kept"]
    assert all(answer["num_of_optimizer"] == answer["num_kept"] < one["num_kept"] for answer in answers)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_stages_of_parts_have_the_bits_of_as_many_parts(ranks: RankPool, of_parts: Run, case: Case) -> None:
    """With AdamW and clipping. The weights of a replica's ranks make up those of the parts."""
    require_bits_of_parts(ranks, of_parts, case)


@pytest.mark.soak
@pytest.mark.parametrize("case", MORE_CASES, ids=named)
def test_other_stages_of_parts_have_the_bits_of_as_many_parts(of_parts: Run, case: Case, tmp_path_factory: Any) -> None:
    with RankPool(8, tmp_path_factory.mktemp("ranks")) as eight:
        require_bits_of_parts(eight, of_parts, case)


def test_bfloat16_and_an_odd_number_of_workers(ranks: RankPool) -> None:
    train = {"virtual_workers": 5, "batch_size": 10, "precision": "bfloat16"}
    case: Case = ("deep", FOUR, "1f1b", True)
    one = in_layout(ranks, without_stages(case), train, 5)[0]
    found = in_layout(ranks, case, train, 5)[0]
    assert (found["history"], found["state"]) == (one["history"], one["state"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wherever_a_rank_fails_all_come_to_the_end_of_the_step(ranks: RankPool, schedule: Schedule) -> None:
    """And hear that the loss is no number. Whoever else gives up does so as its connections are cut, or as it is told
    nothing."""
    require_all_hear(ranks, FOUR, schedule, NUM_FAILURES)


@pytest.mark.soak
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_so_they_do_in_replicas(schedule: Schedule, tmp_path_factory: Any) -> None:
    with RankPool(8, tmp_path_factory.mktemp("ranks")) as eight:
        require_all_hear(eight, EIGHT, schedule, 2 * NUM_FAILURES)


def require_all_hear(ranks: RankPool, layout: Layout, schedule: Schedule, num_failures: int) -> None:
    answers = ranks.run(failing, layout.num_ranks, layout, schedule, schedule != "gpipe", num_failures)
    for number, step in enumerate(zip(*answers, strict=True)):
        assert [is_finite for is_finite, _ in step] == [number == 0] * layout.num_ranks
        causes = [cause for _, causes in step for cause in causes]
        assert causes.count("ValueError('what is this?')") == (number > 0)
        assert not any("Timed out" in cause for cause in causes)
