"""State in shards, on one to four real ranks: the bits of one process, over a whole training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPool
from tests.distributed.sharding import (
    COPIES_FAIL,
    RECIPES,
    joined_parts,
    lent,
    peek,
    refusal,
    take_copies,
    told_of_blocks,
    train_in,
)
from tests.unit.odd_recipes import Odd
from tests.unit.tiny import CPU, Tiny, tiny_preset
from training.checkpoints.state import TrainState
from training.errors import UserError
from training.layout import Layout
from training.parallel.update import require_shardable

MAX_RANKS = 4
NUM_STEPS = 50


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    with RankPool(MAX_RANKS, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool


def in_layout(ranks: RankPool, maybe_layout: Layout | None, recipe: str, *arguments: Any) -> list[dict[str, Any]]:
    """Of each rank; all must end with the same, step by step."""
    world_size = maybe_layout.num_ranks if maybe_layout else 1
    answers: list[dict[str, Any]] = ranks.run(train_in, world_size, recipe, maybe_layout, *arguments)
    for answer in answers:
        assert (answer["state"], answer["history"]) == (answers[0]["state"], answers[0]["history"])
    return answers


QUICK = (("transformer", 4), ("skips", 5))
WORKLOADS = [
    ("transformer", 2, (Layout(shard=2),)),
    ("transformer", 4, (Layout(shard=4), Layout(data=2, shard=2))),
    (
        "transformer",
        6,
        (Layout(shard=2), Layout(shard=4), Layout(data=2, shard=2)),
    ),  # some ranks have more virtual workers than others
    ("skips", 5, (Layout(shard=3), Layout(data=2, shard=2))),
    ("digits", 5, (Layout(shard=3), Layout(data=2, shard=2))),
    ("tiny", 5, (Layout(), Layout(data=2), Layout(shard=2), Layout(shard=3), Layout(shard=4))),
]


@pytest.mark.parametrize(
    ("recipe", "virtual_workers", "layouts"),
    [
        pytest.param(*each, id="-".join(map(str, each[:2])), marks=[] if each[:2] in QUICK else pytest.mark.slow)
        for each in WORKLOADS
    ],
)
def test_sharded_state_has_the_bits_of_one_process(
    ranks: RankPool, recipe: str, virtual_workers: int, layouts: Sequence[Layout]
) -> None:
    """With AdamW, clipping, and as many virtual workers as ranks, or more. The weights' parts make up the whole."""
    train = {
        "virtual_workers": virtual_workers,
        "batch_size": virtual_workers if recipe == "transformer" else 2 * virtual_workers,
    }
    (alone,) = in_layout(ranks, None, recipe, train, NUM_STEPS)
    assert len({loss for loss, _, _ in alone["history"]}) == NUM_STEPS
    assert any(norm > 0.5 for _, norm, _ in alone["history"]), "something was clipped"
    for layout in layouts:
        answers = in_layout(ranks, layout, recipe, train, NUM_STEPS)
        assert answers[0]["history"] == alone["history"], layout
        assert answers[0]["state"] == alone["state"], layout
        replica = answers[: layout.shard]
        assert sum(answer["num_kept"] for answer in replica) == alone["num_weights"]
        for answer in answers:
            assert answer["num_of_optimizer"] == answer["num_kept"]
            assert answer["num_whole_bytes"] == 0, "between steps nothing is gathered"
    if recipe == "transformer":
        sizes = [answer["num_kept"] for answer in in_layout(ranks, Layout(shard=2), recipe, train, 1)]
        assert max(sizes) < 0.65 * alone["num_weights"]


@pytest.mark.slow
def test_bfloat16_has_the_bits_of_one_process(ranks: RankPool) -> None:
    train = {"virtual_workers": 4, "batch_size": 8, "precision": "bfloat16"}
    (alone,) = in_layout(ranks, None, "skips", train, 10)
    assert in_layout(ranks, Layout(shard=4), "skips", train, 10)[0]["state"] == alone["state"]


def test_what_is_saved_in_one_layout_goes_on_in_any_other(ranks: RankPool, tmp_path: Path) -> None:
    layouts = (None, Layout(shard=2), Layout(shard=4), Layout(data=2, shard=2))
    train = {"virtual_workers": 6, "batch_size": 12}
    (calm,) = in_layout(ranks, None, "skips", train, 10)
    files = [str(tmp_path / f"{number}.safetensors") for number in range(len(layouts))]
    for layout, file in zip(layouts, files, strict=True):
        in_layout(ranks, layout, "skips", train, 5, None, file)
    assert len({Path(file).read_bytes() for file in files}) == 1
    for file, layout in product(files[:1], layouts):
        after = in_layout(ranks, layout, "skips", train, 5, file)[0]
        assert (after["state"], after["history"]) == (calm["state"], calm["history"][5:])


def test_weights_that_are_not_there_are_an_error(ranks: RankPool) -> None:
    """And no crash, and no other loss."""
    for told in ranks.run(peek, 2):
        assert told.startswith("RuntimeError: ")
        assert "meta" in told


def test_who_looks_for_what_killed_ranks_has_all_weights(ranks: RankPool) -> None:
    whole = TrainState(RECIPES["skips"], seed=tiny_preset().seed, device=CPU)
    assert ranks.run(lent, 2) == [whole.weights_digest()] * 2


@pytest.mark.parametrize("recipe", ["skips", "digits"])
def test_parts_make_up_the_whole_state(ranks: RankPool, recipe: str) -> None:
    """All names of it: one of the recipes has a tied head."""
    for missing, digests in ranks.run(joined_parts, 2, recipe):
        assert missing == []
        assert digests["joined"] == digests["whole"]


@pytest.mark.parametrize(("recipe", "num_ranks"), [("skips", 2), ("one weight", 3)])
def test_a_group_takes_up_copies_of_all_parts(ranks: RankPool, recipe: str, num_ranks: int) -> None:
    """Also of ranks that have nothing."""
    train = {"virtual_workers": num_ranks, "batch_size": 2 * num_ranks}
    (alone,) = in_layout(ranks, None, recipe, train, 1)
    assert ranks.run(take_copies, num_ranks, recipe) == [(True, 1, alone["state"])] * num_ranks


@pytest.mark.parametrize("fault", COPIES_FAIL)
def test_copies_that_one_rank_cannot_take_up_none_does(ranks: RankPool, fault: str) -> None:
    """All begin elsewhere, with a state that nothing has touched, and nobody waits for ever."""
    first = TrainState(RECIPES["skips"], seed=tiny_preset().seed, device=CPU).state_sha256()
    assert ranks.run(take_copies, 2, "skips", fault) == [(False, 0, first)] * 2


def test_what_cannot_be_sharded_is_refused(ranks: RankPool) -> None:
    assert all("is computed twice" in told for told in ranks.run(told_of_blocks, 2, "twice"))
    assert all("block of the recipe's model returns Held: " in told for told in ranks.run(told_of_blocks, 2, "hides"))
    assert "has weight as torch.float64" in ranks.run(refusal, 1, "double")[0]
    assert "has weight as torch.float32, not contiguous" in ranks.run(refusal, 1, "transposed")[0]


def test_what_cannot_be_sharded_is_refused_before_there_is_a_group() -> None:
    factored = TrainState(Odd(optimizer_kind="adafactor"), seed=1, device=CPU)
    with pytest.raises(UserError, match=r"Adafactor, .* and parallel\.shard need one that treats each"):
        require_shardable(factored, CPU)
    with pytest.raises(UserError, match=r"tried on processors alone so far: use parallel\.shard = 1 on GPUs"):
        require_shardable(TrainState(Tiny(), seed=1, device=CPU), torch.device("cuda"))
