"""Matrices that are cut, on two and four real ranks: within rounding of one process over a whole training, and the same
bits whenever the layout is the same but for replicas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.bounds import num_beyond, with_bounds
from tests.distributed.ranks import RankPool
from tests.distributed.tensoring import (
    BUGS,
    NUM_STEPS,
    RECIPES,
    SEQUENCE,
    TRAIN,
    in_tensors,
    killed,
    refusal,
)
from training.layout import Layout
from training.parallel.measure import measure
from training.parallel.plan import cost

MAX_RANKS = 4
Case = tuple[str, Layout, bool]
CASES: list[Case] = [
    ("transformer", Layout(tensor=2), True),
    ("transformer", Layout(tensor=2), False),
    ("transformer", Layout(tensor=4), True),
    ("transformer", Layout(data=2, tensor=2), True),
]
NUM_STEPS_WITH_BUG = 20
BFLOAT16 = {**TRAIN, "precision": "bfloat16"}
Run = Callable[[Case], dict[str, Any]]


def named(case: Case) -> str:
    recipe, layout, in_sequences = case
    return f"{recipe}, {layout}, sequences {'in parts' if in_sequences else 'whole'}"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(MAX_RANKS, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


@pytest.fixture(scope="module")
def run(ranks: RankPool) -> Run:
    """A whole training in a layout, once."""
    found: dict[Case, dict[str, Any]] = {}

    def run(case: Case) -> dict[str, Any]:
        if case not in found:
            found[case] = in_layout(ranks, case, TRAIN, NUM_STEPS)[0]
        return found[case]

    return run


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[str, Any]:
    """One process, and how far its losses and norms may be from others'."""
    return with_bounds(ranks, "transformer", TRAIN, NUM_STEPS)


def in_layout(ranks: RankPool, case: Case, *arguments: Any) -> list[dict[str, Any]]:
    """Of each rank; all must end with the same, step by step."""
    recipe, layout, in_sequences = case
    answers: list[dict[str, Any]] = ranks.run(in_tensors, layout.num_ranks, recipe, layout, in_sequences, *arguments)
    for answer in answers:
        assert (answer["state"], answer["history"]) == (answers[0]["state"], answers[0]["history"])
    return answers


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=named(case), marks=pytest.mark.slow if case[1] == Layout(tensor=4) else [])
        for case in CASES
    ],
)
def test_a_whole_training_is_within_rounding_of_one_process(run: Run, alone: dict[str, Any], case: Case) -> None:
    """With AdamW and clipping. Of the same samples, with a part of the matrices and of their optimizer's state."""
    found, (_, layout, _) = run(case), case
    assert any(norm > 0.5 for _, norm, _ in alone["history"]), "something was clipped"
    assert found["state"] != alone["state"], "it is not one process's, to the bit"
    assert [samples for *_, samples in found["history"]] == [samples for *_, samples in alone["history"]]
    assert num_beyond(found["history"], alone) == 0
    assert 0 < alone["bounds"][0][-1] < 1e-3
    num_uncut = 2 * (256 * 32) + SEQUENCE * 32 + 2 * 32 + 2 * 6 * 32
    assert found["num_kept"] == num_uncut + (found["num_of_model"] - num_uncut) // layout.tensor
    assert found["num_of_optimizer"] == found["num_kept"]
    assert found["loss_alone"] == pytest.approx(alone["loss_alone"], abs=1e-3), "whole weights compute by themselves"


def test_replicas_and_recomputing_change_no_bit(ranks: RankPool, run: Run) -> None:
    first, replicas = run(CASES[0]), run(CASES[3])
    assert (replicas["state"], replicas["history"]) == (first["state"], first["history"])
    recomputing = in_layout(ranks, ("recomputes", Layout(tensor=2), True), TRAIN, 8)[0]
    assert recomputing["history"] == first["history"][:8]
    assert recomputing["num_saved_bytes"] < first["num_saved_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != "none"])
def test_a_collective_that_is_left_out_is_far_beyond_the_bound(
    ranks: RankPool, alone: dict[str, Any], bug: str
) -> None:
    in_sequences = "norm" in bug
    answers = ranks.run(
        in_tensors, 2, "transformer", Layout(tensor=2), in_sequences, TRAIN, NUM_STEPS_WITH_BUG, None, None, bug
    )
    for answer in answers:
        off = max(abs(one[0] - other[0]) for one, other in zip(answer["history"], alone["history"], strict=False))
        assert off > 10 * alone["bounds"][0][NUM_STEPS_WITH_BUG - 1]
        assert num_beyond(answer["history"], alone) > NUM_STEPS_WITH_BUG


@pytest.mark.slow
def test_bfloat16(ranks: RankPool) -> None:
    one = with_bounds(ranks, "transformer", BFLOAT16, 8)
    for case in (CASES[0], CASES[1]):
        assert num_beyond(in_layout(ranks, case, BFLOAT16, 8)[0]["history"], one) == 0
    assert in_layout(ranks, CASES[3], BFLOAT16, 3)[0]["state"] == in_layout(ranks, CASES[0], BFLOAT16, 3)[0]["state"]


@pytest.mark.slow
def test_killed_and_taken_up_again_it_has_the_same_bits(ranks: RankPool, run: Run, tmp_path: Path) -> None:
    """A rank dies in the midst of a step after the checkpoint; and the same layout twice is the same at all."""
    file, half, case = str(tmp_path / "half"), NUM_STEPS // 2, CASES[0]
    with RankPool(2, tmp_path) as dying, pytest.raises((AssertionError, EOFError, ConnectionResetError)):
        dying.run(killed, 2, Layout(tensor=2), half, file)
    after = in_layout(ranks, case, TRAIN, NUM_STEPS - half, file)[0]
    assert after["state"] == run(case)["state"]
    assert after["history"] == run(case)["history"][half:]


def test_what_is_saved_in_one_layout_is_loaded_in_any_other(ranks: RankPool, tmp_path: Path) -> None:
    """And saved again it is the same file: that of one process, from which one process goes on as well."""
    cases: list[Case | None] = [None, CASES[0], CASES[2], CASES[3]]

    def save(maybe_case: Case | None, num_steps: int, maybe_from: str | None, to: str) -> bytes:
        if maybe_case is None:
            ranks.run(in_tensors, 1, "transformer", None, True, TRAIN, num_steps, maybe_from, to)
        else:
            in_layout(ranks, maybe_case, TRAIN, num_steps, maybe_from, to)
        return Path(to).read_bytes()

    for number, case in enumerate(cases):
        saved = str(tmp_path / str(number))
        first = save(case, 2, None, saved)
        for other in cases:
            assert save(other, 0, saved, str(tmp_path / "again")) == first
        assert save(None, 1, saved, str(tmp_path / "on")) != first


@pytest.mark.slow
def test_ranks_say_and_keep_what_plan_says(run: Run) -> None:
    """But for what is said once a step: gradients of norms, and words."""
    recipe = RECIPES["transformer"]
    sample = {"bytes": np.zeros(SEQUENCE + 1, np.uint8)}
    workers = TRAIN["virtual_workers"]
    model = measure(recipe, sample, batch_size=TRAIN["batch_size"] // workers, precision="float32")
    for case in (CASES[0], CASES[2], CASES[3]):
        found, planned = run(case), cost(model, case[1], None, virtual_workers=workers)
        assert planned.weight_bytes == 4 * found["num_kept"]
        assert planned.optimizer_bytes == 2 * planned.weight_bytes
        assert planned.activation_bytes == found["num_saved_bytes"]
        assert planned.sent_bytes == pytest.approx(found["num_sent"] / NUM_STEPS, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("dropout", r"Dropping\.loss\(\) draws random numbers \(dropout\)"),
        ("buffers", "Counting's model changes buffers"),
        ("repeats", r"Mistaken's model gives a loss of .* if it is cut as cuts\(\) says, and"),
        ("between", r"Between's blocks\.0\.scale gets another gradient"),
        ("pieces", r"along the sequence, its second dimension, it cannot be cut into parallel\.tensor = 3 parts"),
        ("optimizer", r"parallel\.tensor cuts parameters as parallel\.shard does: .* and the recipe's LBFGS could not"),
    ],
)
def test_what_cannot_be_cut_is_refused(ranks: RankPool, kind: str, complaint: str) -> None:
    """By all ranks, before a step."""
    for told in ranks.run(refusal, 3 if kind == "pieces" else 2, kind):
        assert re.search(complaint, told), told
