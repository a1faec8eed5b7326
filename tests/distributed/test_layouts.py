"""One model in all layouts: each beside one process, and what is saved in one is loaded in any other of any kind."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.bounds import num_beyond, with_bounds
from tests.distributed.layouts import RECIPE, TRAIN, Case, trained
from tests.distributed.ranks import RankPool
from tests.faults.evidence import write_evidence
from training.layout import Layout

NUM_STEPS = 50
ALONE = Case(layout=Layout())
FEW = (
    ALONE,
    Case(layout=Layout(shard=2)),
    Case(layout=Layout(pipeline=2), maybe_schedule="1f1b"),
    Case(layout=Layout(tensor=2)),
    Case(layout=Layout(pipeline=2, tensor=2), maybe_schedule="1f1b"),
)
ALL = (
    ALONE,
    *(Case(layout=Layout(data=number)) for number in (2, 4, 8)),
    *(Case(layout=Layout(shard=number)) for number in (2, 4)),
    *(Case(layout=Layout(data=2, shard=number)) for number in (2, 4)),
    Case(layout=Layout(pipeline=2), maybe_schedule="gpipe"),
    Case(layout=Layout(pipeline=2), maybe_schedule="1f1b"),
    Case(layout=Layout(pipeline=2), maybe_schedule="interleaved"),
    Case(layout=Layout(pipeline=4), maybe_schedule="1f1b"),
    Case(layout=Layout(data=2, pipeline=2), maybe_schedule="1f1b"),
    Case(layout=Layout(data=2, pipeline=4), maybe_schedule="gpipe"),
    *(Case(layout=Layout(tensor=number)) for number in (2, 4)),
    *(Case(layout=Layout(data=number, tensor=2)) for number in (2, 4)),
    Case(layout=Layout(pipeline=2, tensor=2), maybe_schedule="interleaved"),
    Case(layout=Layout(pipeline=4, tensor=2), maybe_schedule="gpipe"),
    Case(layout=Layout(data=2, pipeline=2, tensor=2), maybe_schedule="1f1b"),
)
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def ranks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RankPool]:
    most = max(case.layout.num_ranks for case in request.param)
    with RankPool(most, tmp_path) as pool:
        yield pool


def run(ranks: RankPool, case: Case, num_steps: int, maybe_from: str | None, to: str) -> dict[str, Any]:
    """All ranks must end with the same, step by step."""
    answers: list[dict[str, Any]] = ranks.run(trained, case.layout.num_ranks, case, num_steps, maybe_from, to)
    for answer in answers:
        assert (answer["state"], answer["history"]) == (answers[0]["state"], answers[0]["history"])
    return answers[0]


def files_of(ranks: RankPool, cases: Sequence[Case], num_steps: int, folder: Path) -> dict[Case, tuple[Any, bytes]]:
    """What each layout makes of the same beginning, and its file."""
    found = {}
    for number, case in enumerate(cases):
        file = folder / f"{number}.safetensors"
        found[case] = (run(ranks, case, num_steps, None, str(file)), file.read_bytes())
    return found


def require_all_pairs(ranks: RankPool, files: Mapping[Case, bytes], folder: Path) -> int:
    """What any layout saved is loaded by any other, which saves the same bytes. Layouts that saved the same bytes
    need one loading of these by each. Returns the number of pairs, in both orders."""
    num_pairs = 0
    for content in set(files.values()):
        saved = folder / "saved.safetensors"
        saved.write_bytes(content)
        for case in files:
            again = folder / "again.safetensors"
            run(ranks, case, 0, str(saved), str(again))
            assert again.read_bytes() == content, case
            again.unlink()
        num_pairs += len(files) * sum(one == content for one in files.values())
    return num_pairs


@pytest.mark.parametrize("ranks", [FEW], ids=["few"], indirect=True)
def test_each_kind_of_layout_loads_what_any_other_saved(ranks: RankPool, tmp_path: Path) -> None:
    found = files_of(ranks, FEW, 2, tmp_path)
    assert {found[case][1] for case in FEW if case.is_exact} == {found[ALONE][1]}
    files = {case: content for case, (_, content) in found.items()}
    assert len(set(files.values())) == 2, "a tensor layout is within rounding alone"
    assert require_all_pairs(ranks, files, tmp_path) == len(FEW) ** 2


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [ALL], ids=["all"], indirect=True)
def test_all_layouts(ranks: RankPool, tmp_path: Path) -> None:
    """A whole training each, with AdamW and clipping: the bits of one process, or within rounding of it."""
    one = with_bounds(ranks, RECIPE, dict(TRAIN), NUM_STEPS)
    assert len({loss for loss, _, _ in one["history"]}) == NUM_STEPS
    assert any(norm > 0.5 for _, norm, _ in one["history"]), "something was clipped"
    found = files_of(ranks, ALL, NUM_STEPS, tmp_path)
    for case, (told, content) in found.items():
        if case.is_exact:
            assert (told["history"], told["state"]) == (one["history"], one["state"]), case
            assert content == found[ALONE][1], case
        else:
            assert num_beyond(told["history"], one) == 0, case
            assert content == found[Case(layout=Layout(tensor=case.layout.tensor))][1], case
            assert [samples for *_, samples in told["history"]] == [samples for *_, samples in one["history"]]
    files = {case: content for case, (_, content) in found.items()}
    num_pairs = require_all_pairs(ranks, files, tmp_path)
    assert num_pairs == len(ALL) ** 2
    write_evidence("layouts", rows=[_row(case, *found[case], one, files) for case in ALL])


def _row(
    case: Case, told: Mapping[str, Any], content: bytes, one: Mapping[str, Any], files: Mapping[Case, bytes]
) -> dict[str, Any]:
    losses = [(mine[0], other[0]) for mine, other in zip(told["history"], one["history"], strict=True)]
    return {
        "layout": str(case),
        "ranks": case.layout.num_ranks,
        "steps": len(losses),
        "promise": "the bits of one process" if case.is_exact else "within rounding of one process",
        "steps_with_its_loss": sum(mine == other for mine, other in losses),
        "furthest_from_its_loss": max(abs(mine - other) for mine, other in losses),
        "bound": 0.0 if case.is_exact else one["bounds"][0][-1],
        "state_sha256": told["state"],
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "loaded_files_of_layouts": len(files),
        "of_different_bytes": len(set(files.values())),
    }
