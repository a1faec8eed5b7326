"""A drill's document and page: what they say, and that nothing of it comes from elsewhere or goes unescaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.drill.faults import NAMES
from tasks.drill.matrix import MAX_STEPS, MIN_STEPS, drilled, plan, steps_for
from tasks.drill.report import write_report
from tasks.drill.rows import Calm, Report, Row
from tasks.drill.subject import subject_of
from tests.unit.tiny import Tiny, stale_preset, tiny_preset
from training.config import ParallelConfig
from training.errors import UserError


def row(fault: str = "worker-killed", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "title": "kill -9 of a rank",
        "evidence": "rank 7 dead",
        "otherwise": "nothing was seen to suffer",
        "complaints": (),
        "bits_equal": True,
        "detect_seconds": 0.1,
        "next_step_seconds": 0.4,
        "pause_seconds": 0.5,
        "steps_redone": 0,
        "is_redone_at_least": False,
        "samples_duplicated": 0,
        "num_groups": 2,
        "run_seconds": 12.0,
    }
    return Row(fault=fault, **{**values, **changes})


def report(*rows: Row) -> Report:
    calm = Calm(
        state_sha256="5" * 64,
        weights_sha256="6" * 64,
        num_samples_read=6400,
        num_whole_epochs=4,
        run_seconds=11.0,
        complaints=(),
    )
    return Report(
        id="20260101-000000-abcdef",
        begun_at=0.0,
        seconds=200.0,
        preset="tiny",
        subject="1" * 64,
        code="2" * 64,
        commit="none",
        environment={"torch": "2.13.0"},
        num_nodes=2,
        processes_per_node=1,
        num_cores=2,
        num_steps=100,
        batch_size=64,
        checkpoint_every_steps=10,
        step_seconds=0.02,
        silence_seconds=3.0,
        hang_seconds=3.0,
        preset_hang_seconds=30.0,
        calm=calm,
        rows=rows,
    )


def test_a_row_is_green_only_if_its_fault_fired_and_nothing_is_to_be_complained_of() -> None:
    assert row().status == "green"
    assert row(evidence="").status == "not fired"
    assert row(complaints=("the state is another",)).status == "red"
    assert row(complaints=("nobody went on",), evidence="").status == "red"


def test_a_drill_is_green_only_if_all_rows_are() -> None:
    assert report(row()).is_green
    assert not report(row(), row(evidence="")).is_green
    assert not report(row(complaints=("x",))).is_green
    assert not report().is_green
    restless = replace(report().calm, complaints=("ranks regrouped",))
    assert not replace(report(row()), calm=restless).is_green


def test_the_files(tmp_path: Path) -> None:
    told = report(row(), row("all-killed", evidence="", complaints=("<b>other</b> bits",), next_step_seconds=None))
    page, document = write_report(told, tmp_path / "new")
    text = page.read_text()
    assert "&lt;b&gt;other&lt;/b&gt; bits" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(src|href)=|url\(|@import|<script", text), "it must need nothing from elsewhere"
    found = json.loads(document.read_text())
    assert found == json.loads(json.dumps(told.to_json()))
    assert (found["format"], found["verdict"], [r["status"] for r in found["rows"]]) == (1, "red", ["green", "red"])
    assert replace(told, seconds=1.0).sha256 != told.sha256


def test_what_cannot_be_drilled_is_refused_with_what_to_do() -> None:
    preset = tiny_preset(steps=10)
    with pytest.raises(UserError, match=r"no fault 'fire' \(known: worker-killed"):
        plan(preset, faults=["fire"])
    with pytest.raises(UserError, match=f"a drill needs {MIN_STEPS} at least"):
        plan(preset, steps=3)
    with pytest.raises(UserError, match=r"train.mode = 'fast' promises no bits"):
        plan(replace(preset, train=replace(preset.train, mode="fast")))
    with pytest.raises(UserError, match=r"train.staleness = 2 promises no bits .* --set train.staleness=0"):
        plan(stale_preset(steps=10))
    for field in ("shard", "pipeline"):
        with pytest.raises(UserError, match=rf"parallel.{field} = 2: a lost rank takes .* --set parallel.{field}=1"):
            plan(replace(preset, launch=replace(preset.launch, nodes=2), parallel=ParallelConfig(**{field: 2})))
    in_parts = replace(preset, launch=replace(preset.launch, nodes=2), parallel=ParallelConfig(tensor=2))
    with pytest.raises(UserError, match=r"parallel.tensor = 2: .* parallel.tensor=1, of another run"):
        plan(in_parts)
    alone = replace(preset.launch, nodes=1)
    with pytest.raises(UserError, match=r"train.virtual_workers = 1: a drill trains on two nodes"):
        plan(replace(preset, launch=alone, train=replace(preset.train, virtual_workers=1)))
    assert plan(preset, faults=["all-killed", "all-killed"]).faults == ("all-killed",)
    assert plan(preset).faults == NAMES


def test_what_a_drill_changes_is_not_what_it_speaks_for() -> None:
    preset = tiny_preset(steps=10)
    changed = drilled(preset, seed=7, steps=200)
    assert (changed.seed, changed.train.steps, changed.train.checkpoint_every_steps) == (7, 200, 20)
    assert (changed.launch.nodes >= 2, changed.launch.min_nodes) == (True, 1)
    assert subject_of(changed, Tiny()) == subject_of(preset, Tiny())
    other = replace(preset, train=replace(preset.train, clip_norm=9.0))
    assert subject_of(other, Tiny()) != subject_of(preset, Tiny())


def test_as_many_steps_as_fill_a_moment_and_let_a_node_come_back() -> None:
    assert steps_for(0.1, start_seconds=4.0) == 120
    assert steps_for(0.1, start_seconds=10.0) == 200
    assert steps_for(0.1, start_seconds=600.0) == 600
    assert steps_for(60.0, start_seconds=4.0) == MIN_STEPS
    assert steps_for(0.0, start_seconds=4.0) == MAX_STEPS
