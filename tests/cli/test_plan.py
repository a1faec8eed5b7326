"""`unbroken plan`: a table of layouts, of which one is recommended. It needs no stack."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

from flows.cli.plan import advice
from tests.cli.commands import complaint
from tests.conftest import UNBROKEN
from tests.infra.probes import environment_for
from training.layout import Layout
from training.preset_file import load_preset


def test_layouts_of_a_preset_are_compared(tmp_path: Path) -> None:
    done = _plan(tmp_path, "stdlib", "--nodes", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 2
    layouts = [({k: n for k, n in one["layout"].items() if n > 1}, one["schedule"]) for one in found["layouts"]]
    assert layouts == [
        ({"data": 2}, None),
        ({"shard": 2}, None),
        ({"pipeline": 2}, "gpipe"),
        ({"pipeline": 2}, "1f1b"),
        ({"tensor": 2}, None),
    ]
    (best,) = (one for one in found["layouts"] if one["recommended"])
    assert best["layout"]["data"] == 2
    tight = _plan(tmp_path, "stdlib", "--nodes", "2", "--memory", str(best["memory_bytes"] - 1))
    (row,) = (re.split(" {2,}", line) for line in tight.stdout.splitlines() if line.startswith("→"))
    chosen, schedule = row[1:3]

    assert chosen != "data 2"
    by_name = {str(layout): layout for layout in (Layout(**one["layout"]) for one in found["layouts"])}
    assert tight.stdout.endswith(advice(by_name[chosen], schedule, 2) + "\n")


def test_what_is_recommended_is_told_as_a_preset_wants_it() -> None:
    assert advice(Layout(data=2), None, 4).endswith("[launch]\nnodes = 4")
    assert advice(Layout(data=2, shard=2), None, 4).endswith("[launch]\nnodes = 4\n\n[parallel]\nshard = 2")
    pipelined = advice(Layout(data=2, pipeline=2), "gpipe", 4)
    assert pipelined.endswith('[launch]\nnodes = 4\n\n[parallel]\npipeline = 2\nschedule = "gpipe"')
    in_tensors = advice(Layout(data=2, tensor=2), None, 4)
    assert in_tensors.endswith("[launch]\nnodes = 4\n\n[parallel]\ntensor = 2")
    assert advice(Layout(tensor=4), None, 4, has_whole_sequences=True).endswith('tensor = 4\nsequences = "whole"')
    assert "replicas of shards alone so far" in advice(Layout(pipeline=2, shard=2), "1f1b", 4)
    assert "replicas of shards alone so far" in advice(Layout(shard=2, tensor=2), None, 4)


def test_what_is_recommended_is_accepted() -> None:
    layouts = [Layout(data=2, shard=4), Layout(pipeline=4, tensor=2), Layout(data=2, pipeline=2, tensor=2)]
    for layout in layouts:
        told = tomllib.loads(advice(layout, "1f1b", 8, has_whole_sequences=True).partition(":")[2])
        overrides = {f"{section}.{key}": value for section in told for key, value in told[section].items()}
        parallel = load_preset("stdlib", overrides).parallel
        assert (parallel.shard, parallel.pipeline, parallel.tensor) == (layout.shard, layout.pipeline, layout.tensor)
        assert parallel.sequences == ("whole" if layout.tensor > 1 else "parts")


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert "--nodes 0: must be at least 1" in complaint(_plan(tmp_path, "digits", "--nodes", "0"))
    assert "raise train.virtual_workers = 8" in complaint(_plan(tmp_path, "digits", "--nodes", "9"))


def _plan(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [UNBROKEN, "plan", *arguments],
        cwd=folder,
        env=environment_for(folder / "home"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
