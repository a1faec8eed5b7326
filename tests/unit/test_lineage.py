"""Lineage without servers: what is kept of an origin, the tree, windows, comparisons, and the weights' digest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.lifecycle.champion import Entry
from tasks.lifecycle.model_file import KeptVersion
from tasks.lineage.facts import Code, Gate, Lineage, Training
from tasks.lineage.gather import _gate, decision_key
from tasks.lineage.replay import Window, compare, parse_window
from tasks.lineage.tree import MAX_DESCRIPTION_CHARACTERS, Node, _training, markdown, terminal_lines, tree_of
from tasks.lineage.verify import LineageError, exactness, first_difference
from tasks.provenance import Reproduced, Start, keep_start, start_of, starts_of
from tasks.registry import GATE_TAG
from tests.unit.champions import SIGNATURE
from tests.unit.tiny import Tiny, exact_arithmetic, make_trainer, stale_preset, tiny_preset
from training.config import Preset
from training.documents import canonical_json, sha256_hex
from training.errors import DamagedError, UserError
from training.replay import Replayed, begin_replay
from training.runs.identity import find_identity, identity_key, keep_identity, source_file
from training.runs.job import Job
from training.runs.record import Record, run_key
from training.s3.objectstore import Store
from training.step import DIGEST_BYTES_PER_STEP, digest_period

KEPT = KeptVersion(
    model="m",
    version="3",
    run_key="k",
    weights_sha256="w",
    dataset_digest="d",
    model_sha256="f",
    num_bytes=1000,
    signature=SIGNATURE,
)


@pytest.mark.parametrize(
    ("text", "window"),
    [("3:5", Window(first=3, last=5)), (":5", Window(first=1, last=5)), ("3:", Window(first=3, last=9))],
)
def test_windows(text: str, window: Window) -> None:
    assert parse_window(text, 9, 6) == window


def test_without_a_window_it_is_what_follows_the_last_checkpoint() -> None:
    assert parse_window(None, 9, 6) == Window(first=7, last=9)


@pytest.mark.parametrize("text", ["5", "a:b", "5:3", "0:2", "3:10", "-1:2", ""])
def test_bad_windows_are_named(text: str) -> None:
    with pytest.raises(UserError, match="--steps"):
        parse_window(text, 9, 6)


def test_a_step_is_compared_by_all_that_was_told_of_it() -> None:
    now = Replayed(step=4, loss=0.5, grad_norm=1.25, samples="line", weights="digest")
    told: dict[str, Any] = {"loss": 0.5, "grad_norm": 1.25, "samples": "line", "seconds": 3.0}
    assert not compare(now, told, is_asked=True).has_digest
    assert compare(now, {**told, "weights": "digest"}, is_asked=True).has_digest
    for name, other in (("weights", "other"), ("loss", 0.5000001), ("grad_norm", 1.0), ("samples", "x")):
        with pytest.raises(LineageError, match=f"step 4 differs: its {name.replace('_', ' ')} is"):
            compare(now, {**told, name: other}, is_asked=True)
    with pytest.raises(LineageError, match="step 4 is missing"):
        compare(now, None, is_asked=True)


def test_the_first_line_that_differs_is_named() -> None:
    before = b"import json\nlr = 0.1\nend\n"
    assert first_difference(before, b"import json\nlr = 0.2\nend\n") == (
        ":2 differs from the source that was trained: it has 'lr = 0.2', where 'lr = 0.1' was"
    )
    assert first_difference(before, b"import json\nend\n").startswith(":2 differs")
    assert first_difference(before, before.replace(b"\n", b"\r\n")).endswith("in its line ends")


def test_tree_and_description() -> None:
    entry = Entry(
        action="promote", version="3", run_key="k", model_sha256="f", by="me", reason="better", sequence=2, time=1.0
    )
    code = Code(
        recipe="r:R",
        recipe_source=None,
        numerics_version=None,
        sources={},
        starts=(Start(generation=0, by="me@here", commit="c", flow_run="id", dvc=Reproduced(stage="s", revision="v")),),
    )
    lineage = Lineage(
        kept=KEPT,
        training=None,
        data=None,
        code=code,
        gate=Gate(decision_sha256="g", passed=True, champion=None, reasons=("all well",)),
        history=(entry,),
        is_champion=True,
        tags={},
        links={"registry": "http://x"},
        unknown=("the run is gone",),
    )
    lines = list(terminal_lines(tree_of(lineage)))
    assert lines[:3] == ["model m version 3", "├─ model file sha256 f, 1,000 bytes", "│  └─ weights sha256 w"]
    text = "\n".join(lines)
    for part in ("champion", "promote by me", "better", "gate: passed without a champion", "flow run id", "revision v"):
        assert part in text
    assert lines[-2:] == ["└─ not known", "   └─ the run is gone"]
    assert "- links\n  - registry: http://x" in markdown(tree_of(lineage))


def test_a_description_is_cut_and_says_so() -> None:
    text = markdown(Node("", [Node("x" * 90)] * 100))
    assert len(text) < MAX_DESCRIPTION_CHARACTERS
    assert text.endswith("(the rest: `unbroken models why`)")


def test_identity_is_kept_once_and_proves_itself(store: Store) -> None:
    recipe, preset = Tiny(), tiny_preset()
    key = run_key(recipe=recipe, preset=preset, dataset_digest="d")
    assert find_identity(store, key) is None
    for _ in range(2):
        keep_identity(store, key, recipe=recipe, preset=preset, dataset_digest="d")
    found = find_identity(store, key)
    assert found is not None
    assert found.determining["dataset"] == "d"
    assert "class Tiny" in found.sources["tests.unit.tiny"].text
    whole = store.get(identity_key(key))
    changes = ((b"class Tiny", b"class Tony"), (b'"seed":7', b'"seed":8'), (b'"utf-8"', b'"utf-9"'))
    for damaged in (*(whole.replace(was, now) for was, now in changes), b"{", b"[]"):
        assert damaged != whole
        store.put(identity_key(key), damaged)
        with pytest.raises(DamagedError, match=r"identity\.json is damaged"):
            find_identity(store, key)
    keep_identity(store, key, recipe=recipe, preset=preset, dataset_digest="d")
    assert store.get(identity_key(key)) == whole, "mended"
    store.put(identity_key(key), canonical_json({**json.loads(whole), "format": 9}))
    with pytest.raises(DamagedError, match="format 9"):
        find_identity(store, key)
    with pytest.raises(UserError, match="start it again"):
        keep_identity(store, "other", recipe=recipe, preset=preset, dataset_digest="d")


def test_source_of_any_bytes_is_kept_as_it_is() -> None:
    for data in ("ä = 1\r\n".encode(), "# coding: latin-1\nä = 1\n".encode("latin-1")):
        assert source_file("p", data).data == data


def test_starts_are_kept_once_each(store: Store, tmp_path: Path) -> None:
    preset = replace(tiny_preset(), folder=str(tmp_path))
    for flow_run in ("a", "b", "a"):
        keep_start(store, "k", preset, generation=0, flow_run=flow_run)
    assert {start.flow_run for start in starts_of(store, "k")} == {"a", "b"}
    assert {start.commit for start in starts_of(store, "k")} == {"none"}
    key = next(key for key, _ in store.list_keys("runs/k/starts/"))
    store.put(key, store.get(key).replace(b'"none"', b'"some"'))
    with pytest.raises(DamagedError, match="runs/k/starts/"):
        starts_of(store, "k")


def test_dvc_is_told_by_its_environment(tmp_path: Path) -> None:
    preset = replace(tiny_preset(), folder=str(tmp_path))
    environment = {"DVC_STAGE": "train", "DVC_ROOT": str(tmp_path), "DVC_EXP_NAME": "bold-owl"}
    start = start_of(preset, generation=0, flow_run=None, environment=environment)
    assert start.dvc == Reproduced(stage="train", revision="none", experiment="bold-owl")
    assert start_of(preset, generation=0, flow_run=None, environment={}).dvc is None


def test_how_often_weights_are_digested() -> None:
    train = tiny_preset().train
    assert digest_period(train, 1000) == 1
    assert digest_period(train, 10 * DIGEST_BYTES_PER_STEP + 1) == 11
    assert digest_period(replace(train, digest_every_steps=0), 1000) == 0
    assert digest_period(replace(train, digest_every_steps=7), 1 << 40) == 7
    assert digest_period(replace(train, mode="fast", digest_every_steps=7), 1000) == 0
    assert digest_period(stale_preset().train, 1000) == 0


@pytest.mark.parametrize(
    ("preset", "setting"), [(tiny_preset(mode="fast"), "train.mode = 'fast'"), (stale_preset(), "train.staleness = 2")]
)
def test_what_is_not_exact_is_not_replayed(preset: Preset, setting: str, store: Store) -> None:
    job = Job(key="k", generation=0, preset=preset, dataset_digest="d", location=store.location)
    with pytest.raises(UserError, match=f"trained with {setting}, which promises no bits"):
        begin_replay(job, Record(key="k"), first=1)
    assert [(one.is_whole, one.note) for one in exactness(job)] == [
        (False, f"{setting}: done again, it gives another result")
    ]
    training = Training(
        run_key="k",
        generation=0,
        steps=6,
        state_sha256="s",
        environment={},
        attempts=(),
        departures=(),
        checkpoints=(),
        quarantined=(),
        inexact=preset.train.maybe_inexact,
        initial=None,
        continued=None,
        preset=preset.to_json(),
    )
    assert f"not exact ({setting}): done again, it gives another result" in markdown(_training(training))


def test_the_digest_of_the_weights_is_told_when_due_and_follows_every_bit() -> None:
    with exact_arithmetic():
        trainer = make_trainer(preset=tiny_preset(digest_every_steps=2))
        for _ in range(4):
            trainer.train_step()
        told = [entry.values.get("weights") for entry in trainer.handover.journal]
        assert [step for step, digest in enumerate(told, start=1) if digest] == [2, 4]
        assert told[-1] == trainer.state.weights_digest()
        weight = next(trainer.state.model.parameters())
        with torch.no_grad():
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
        assert trainer.state.weights_digest() != told[-1]


def test_a_source_that_its_encoding_does_not_have_is_damage(store: Store) -> None:
    source = {"path": "a.py", "text": "€", "encoding": "latin-1"}
    store.put(identity_key("k"), canonical_json({"determining": {}, "sources": {"a": source}}))
    with pytest.raises(DamagedError, match=r"identity\.json is damaged: .* sources\.a: .*latin-1"):
        find_identity(store, "k")


@pytest.mark.parametrize("document", [{}, {"decision": 3, "champion": None}, {"decision": {"passed": True}}])
def test_a_decision_that_is_none_is_told_as_unknown(store: Store, document: dict[str, object]) -> None:
    data, unknown = canonical_json(document), list[str]()
    store.put(decision_key("m", sha256_hex(data)), data)
    assert _gate(store, "m", (), {f"{GATE_TAG}.decision": sha256_hex(data)}, unknown) is None
    assert "is damaged" in unknown[0]
