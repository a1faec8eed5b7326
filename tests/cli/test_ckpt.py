"""`unbroken ckpt` on a run with two checkpoints: shown, proven, carried elsewhere."""

from __future__ import annotations

import json
import subprocess
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.cli.commands import complaint, unbroken
from tests.conftest import Stack
from tests.unit.champions import keep
from tests.unit.fakes import DictRendezvous
from training.checkpoints.checkpoint import folder
from training.checkpoints.saver import CheckpointSaver
from training.runs.record import Result, RunRecord
from training.s3.objectstore import Store, StoreLocation

KEY = "aa11"


@dataclass(frozen=True, kw_only=True)
class Saved:
    stack: Stack
    prefix: str
    run: RunRecord

    def ckpt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return unbroken(self.stack, "ckpt", *arguments, variables={"UNBROKEN_S3_PREFIX": self.prefix})


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((2, 3), float(step)), "optimizer.step.weight": torch.tensor(float(step))}


@pytest.fixture
def saved(stack: Stack) -> Saved:
    prefix = f"tests/{uuid.uuid4().hex}"
    where = stack.location
    run = RunRecord(Store(StoreLocation(endpoint=where.endpoint, bucket=where.bucket, prefix=f"{prefix}/")), KEY)
    run.create_if_missing()
    record = run.update(lambda record: replace(record, token=1))
    saver = CheckpointSaver(
        run=run,
        prefix=run.prefix(record),
        rendezvous=DictRendezvous(),  # type: ignore[arg-type]  # it has all that is used
        rank=0,
        world_size=1,
        token=1,
        keep=9,
        before_commit=lambda: None,
    )
    for step in (2, 4):
        saver.save(step, tensors_of(step), on_commit=lambda reference: None)
        saver.wait()
    return Saved(stack=stack, prefix=prefix, run=run)


def test_checkpoints_are_listed_shown_and_proven(saved: Saved) -> None:
    listed = json.loads(saved.ckpt("ls", "aa", "--json").stdout)
    assert [c["step"] for c in listed["checkpoints"]] == [2, 4]
    shown = json.loads(saved.ckpt("show", "aa", "--step", "2").stdout)
    assert shown["step"] == 2
    assert shown["tensors"]["model.weight"]["shape"] == [2, 3]
    done = saved.ckpt("verify", "aa", "--json")
    assert [(row["step"], row["damage"]) for row in json.loads(done.stdout)] == [(2, None), (4, None)]


def test_damage_is_named_with_exit_code_6(saved: Saved) -> None:
    key = folder(f"runs/{KEY}/0/", 2, 1) + "part-0.safetensors"
    data = saved.run.store.get(key)
    saved.run.store.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    done = saved.ckpt("verify", "aa", "--json")
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    damages = {row["step"]: row["damage"] for row in json.loads(done.stdout)}
    assert "part-0.safetensors is damaged" in damages[2]
    assert damages[4] is None
    assert "steps 2:" in done.stderr


def test_unsigned_run_is_refused_where_a_key_is_set_until_it_is_signed(saved: Saved, tmp_path: Path) -> None:
    key = tmp_path / "signing.key"
    key.touch(mode=0o600)
    key.write_text("k" * 64)
    signing = {"UNBROKEN_SIGNING_KEY_FILE": str(key), "UNBROKEN_S3_PREFIX": saved.prefix}
    line = complaint(unbroken(saved.stack, "ckpt", "show", "aa", variables=signing), code=6)
    assert "manifest.json carries no signature. If you know who wrote it, `unbroken ckpt sign aa11` signs it" in line
    assert "no signing key is known" in complaint(saved.ckpt("sign", "aa"))
    part = folder(f"runs/{KEY}/0/", 2, 1) + "part-0.safetensors"
    data = saved.run.store.get(part)
    saved.run.store.put(part, data[:-1] + bytes([data[-1] ^ 1]))
    assert "part-0.safetensors is damaged" in complaint(
        unbroken(saved.stack, "ckpt", "sign", "aa", variables=signing), code=6
    )
    saved.run.store.put(part, data)
    refused = "ckpt", "sign", "aa"
    for step, why in ((4, "checkpoint 4: its weights have sha256"), (3, "has no more the checkpoint of its result")):
        checkpoint = replace(saved.run.read().checkpoints[-1], step=step)
        result = Result(step=step, weights_sha256="w", state_sha256="s", checkpoint=checkpoint)
        saved.run.update(lambda record, result=result: replace(record, result=result))  # type: ignore[misc]
        assert why in complaint(unbroken(saved.stack, *refused, variables=signing), code=6)
    saved.run.update(lambda record: replace(record, result=None))
    keep(saved.run.store, "m", "1")
    for command in (("ckpt", "sign", "aa"), ("models", "sign", "m")):
        done = unbroken(saved.stack, *command, variables=signing)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("signed\n")
        assert "k" * 64 not in done.stdout + done.stderr
    assert unbroken(saved.stack, "ckpt", "verify", "aa", variables=signing).returncode == 0


def test_exported_weights_are_a_plain_state_dict(saved: Saved, tmp_path: Path) -> None:
    weights, whole = tmp_path / "weights.safetensors", tmp_path / "whole.safetensors"
    assert saved.ckpt("export", "aa", "--to", str(weights)).returncode == 0
    model = torch.nn.Linear(3, 2, bias=False)
    model.load_state_dict(safetensors.torch.load_file(weights))
    assert torch.equal(model.weight, tensors_of(4)["model.weight"])
    assert saved.ckpt("export", "aa", "--to", str(whole), "--step", "2", "--state").returncode == 0
    assert set(safetensors.torch.load_file(whole)) == set(tensors_of(2))


def test_mistakes_are_one_line(saved: Saved, tmp_path: Path) -> None:
    there = tmp_path / "there.safetensors"
    there.touch()
    assert f"{there} exists" in complaint(saved.ckpt("export", "aa", "--to", str(there)))
    line = complaint(saved.ckpt("show", "aa", "--step", "3"))
    assert line.endswith("has no checkpoint of step 3: there is 2, 4")
    nowhere = tmp_path / "no" / "folder.safetensors"
    assert "name a file in a folder that is there" in complaint(saved.ckpt("export", "aa", "--to", str(nowhere)))
    too_long = tmp_path / ("x" * 251 + ".safetensors")
    assert "cannot write" in complaint(saved.ckpt("export", "aa", "--to", str(too_long)), code=3)
