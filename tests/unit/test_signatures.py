"""Whoever writes the bucket and has no key cannot say which bytes are the model: each forgery is believed without the
key setting, and refused with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from tasks.lifecycle import champions, model_file
from tasks.lifecycle.model_file import file_key, version_key
from tests.unit.champions import change, keep, program
from tests.unit.fakes import CountingStore
from tests.unit.test_checkpoint import Group, tensors_of
from tests.unit.test_continuation import Runs
from training import replay, signatures
from training.checkpoints import trust
from training.checkpoints.checkpoint import folder, load_checkpoint, load_manifest, newest_proven
from training.checkpoints.continuation import take_over
from training.data.cache import ShardCache
from training.data.manifest import ShardInfo
from training.data.shard import encode_shard
from training.documents import canonical_json, fast_digest, sha256_hex
from training.errors import DamagedError, UntrustedError, UserError
from training.runs.record import CheckpointRef, Result, RunRecord, with_checkpoint, with_result
from training.s3.objectstore import Store

FORGED = {"model.weight": torch.full((9, 4), 6.66)}
ONE, TWO = "1" * 64, "2" * 64


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """This process has these keys from now on, or none."""

    def set_keys(*keys: str) -> Path:
        path = tmp_path / "signing.key"
        path.touch(mode=0o600)
        path.write_text("".join(f"{key}\n" for key in keys))
        if keys:
            monkeypatch.setenv(signatures.VARIABLE, str(path))
        else:
            monkeypatch.delenv(signatures.VARIABLE, raising=False)
        return path

    set_keys()
    return set_keys


def begun(store: Store, key: str) -> RunRecord:
    run = RunRecord(store, key)
    run.create_if_missing()
    run.update(lambda record: replace(record, token=1))
    return run


def forge(run: RunRecord, step: int, *, signature: str | None = None) -> CheckpointRef:
    """Part, manifest and record, all digests fitting: as whoever may write the bucket can."""
    base = folder(run.prefix(run.read()), step, 1)
    part = safetensors.torch.save(FORGED)
    run.store.put(base + "part-0.safetensors", part)
    info = {"dtype": "torch.float32", "shape": [9, 4], "slices": [{"part": 0, "start": [0, 0], "shape": [9, 4]}]}
    about = {"name": "part-0.safetensors", "sha256": sha256_hex(part), "num_bytes": len(part)}
    manifest = canonical_json({"format": 1, "step": step, "tensors": {"model.weight": info}, "parts": [about]})
    run.store.put(base + "manifest.json", manifest)
    forged = CheckpointRef(step=step, token=1, sha256=sha256_hex(manifest), signature=signature)
    run.update(lambda record: with_checkpoint(record, forged))
    return forged


def refused(run: RunRecord, why: str) -> None:
    """At once: no object of it is read, nothing is quarantined, and no older one is taken in its place."""
    reading = CountingStore(run.store)
    before = run.read()
    with pytest.raises(UntrustedError, match=why):
        newest_proven(RunRecord(reading, run.run_key), token=1)
    assert [key for key in reading.fetched if "/checkpoints/" in key] == []
    assert run.read() == before


def test_forged_checkpoint_is_believed_without_a_key_and_refused_with_one(
    store: Store, use: Callable[..., Path]
) -> None:
    run = begun(store, "k")
    Group(run=run).save(2)
    forge(run, 4)
    found = newest_proven(run, token=1)
    assert found is not None
    assert torch.equal(found[1]["model.weight"], FORGED["model.weight"])
    use(ONE)
    where = store.location.uri(folder("runs/k/0/", 4, 1) + "manifest.json")
    refused(run, f"^{where} carries no signature. If you know who wrote it, `unbroken ckpt sign k` signs it")


def test_what_a_group_saves_with_a_key_is_believed(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    run = begun(store, "k")
    saved = Group(run=run, world_size=3).save(4)
    found = newest_proven(run, token=1)
    assert found is not None
    assert found[0] == saved
    assert found[1].keys() == tensors_of(4).keys()
    use()
    assert newest_proven(run, token=1) is not None  # who has no key checks none


@pytest.mark.parametrize("moved_to", ["another run", "another step", "another token", "another generation"])
def test_signature_of_one_checkpoint_is_none_of_another(store: Store, use: Callable[..., Path], moved_to: str) -> None:
    use(ONE)
    run = begun(store, "k")
    saved = Group(run=run).save(4)
    other = begun(store, "other")
    other.update(lambda record: replace(record, token=2, generation=1 if moved_to == "another generation" else 0))
    claims = {"another step": replace(saved, step=5), "another token": replace(saved, token=2)}
    if moved_to == "another run":
        at = other
    else:
        run.update(lambda record: replace(record, token=2, generation=1 if moved_to == "another generation" else 0))
        at = run
    claimed = claims.get(moved_to, saved)
    for key, _ in list(store.list_keys("runs/k/0/checkpoints/")):
        name = key.rpartition("/")[2]
        store.put(folder(at.prefix(at.read()), claimed.step, claimed.token) + name, store.get(key))
    at.update(lambda record: replace(record, checkpoints=(claimed,)))
    refused(at, "carries a signature of something else")
    use()
    assert newest_proven(at, token=2) is not None


def test_cut_changed_and_odd_signatures_are_refused(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    run = begun(store, "k")
    saved = Group(run=run).save(4)
    assert saved.signature is not None
    for wrong in (
        saved.signature[:-1],
        saved.signature[:-1] + "é",
        saved.signature + "0",
        saved.signature[:9],
        "",
        None,
    ):
        run.update(lambda record, wrong=wrong: replace(record, checkpoints=(replace(saved, signature=wrong),)))  # type: ignore[misc]
        refused(run, "carries|is signed with key")


def test_older_signed_checkpoint_may_be_put_back(store: Store, use: Callable[..., Path]) -> None:
    """What a signature cannot tell (docs/security.md): the run goes on from there, to the same bits."""
    use(ONE)
    run = begun(store, "k")
    group = Group(run=run)
    first = group.save(2)
    group.save(4)
    run.update(lambda record: replace(record, checkpoints=(first,)))
    found = newest_proven(run, token=1)
    assert found is not None
    assert found[0].step == 2


def test_keys_are_changed_without_signing_anything_again(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    run = begun(store, "k")
    old = Group(run=run).save(2)
    use(TWO, ONE)
    new = Group(run=run).save(4)
    assert load_manifest(store, "runs/k/0/", old).step == 2
    assert load_manifest(store, "runs/k/0/", new).step == 4
    path = use(TWO)
    assert load_manifest(store, "runs/k/0/", new).step == 4
    with pytest.raises(UntrustedError, match=rf"is signed with key '[0-9a-f]{{8}}', and {path} has '[0-9a-f]{{8}}'"):
        load_manifest(store, "runs/k/0/", old)
    run.update(lambda record: trust.resigned(run, record))
    assert [load_manifest(store, "runs/k/0/", reference).step for reference in run.read().checkpoints] == [2, 4]


def test_result_that_points_at_an_older_checkpoint_is_refused(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    run = begun(store, "k")
    group = Group(run=run)
    early, last = group.save(2), group.save(4)
    honest = trust.signed_result("runs/k/0/", Result(step=4, weights_sha256="w", state_sha256="s", checkpoint=last))
    assert trust.trusted_result(run, run.update(lambda r: with_result(r, honest, token=1))) == honest
    inexact = replace(honest, inexact="train.staleness = 2")
    for wrong in (replace(honest, step=2, checkpoint=early), inexact, replace(honest, signature=None)):
        record = run.update(lambda r, wrong=wrong: with_result(r, wrong, token=1))  # type: ignore[misc]
        with pytest.raises(UntrustedError, match=r"the result in s3://.*/runs/k/record.json carries"):
            trust.trusted_result(run, record)
    use()
    assert trust.trusted_result(run, run.read()).signature is None


def test_more_steps_go_on_from_a_signed_run_and_not_from_a_forged_one(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    runs = Runs(store)
    short, longer = runs.begin_and_train(4), runs.begin(6)
    (sibling,) = runs.siblings(longer, 6)
    assert trust.trusted_result(short, short.read()).step == 4
    unsigned = replace(
        sibling,
        record=replace(
            sibling.record, checkpoints=tuple(replace(c, signature=None) for c in sibling.record.checkpoints)
        ),
    )
    assert take_over(longer, unsigned).continued is None
    (mine,) = take_over(longer, sibling).checkpoints
    assert load_checkpoint(store, "/".join(["runs", longer.run_key, "0", ""]), mine)
    assert trust.trusted_result(longer, runs.train(longer, 6)).step == 6


def test_forged_version_and_champion_are_believed_without_a_key_and_refused_with_one(
    store: Store, use: Callable[..., Path]
) -> None:
    keep(store, "m", "1")
    forged = b"a program of somebody else"
    store.put(file_key("m", sha256_hex(forged)), forged)
    read = store.read_versioned(version_key("m", "1"))
    kept = replace(model_file.find(store, "m", "1"), model_sha256=sha256_hex(forged), num_bytes=len(forged))
    document = {**read.document, "kept": asdict(kept), "sha256": sha256_hex(canonical_json(asdict(kept)))}
    store.replace_versioned(version_key("m", "1"), document, read=read)
    champions.begin(store, "m", change("1", "first"))
    assert model_file.prove(store, model_file.find(store, "m", "1")) == forged
    assert champions.read(store, "m").current.version == "1"
    use(ONE)
    with pytest.raises(
        UntrustedError, match=r"models/m/versions/1.json carries no signature.*`unbroken models sign m`"
    ):
        model_file.find(store, "m", "1")
    with pytest.raises(UntrustedError, match=r"models/m/champion.json carries no signature.*`unbroken models sign m`"):
        champions.read(store, "m")
    with pytest.raises(UntrustedError, match="carries no signature"):
        champions.change(store, "m", lambda champion: champion)  # nor is it signed on the way


def test_version_that_was_kept_with_a_key_is_believed_in_its_own_place_alone(
    store: Store, use: Callable[..., Path]
) -> None:
    use(ONE)
    keep(store, "m", "1")
    assert model_file.prove(store, model_file.find(store, "m", "1")) == program("1").data
    assert champions.begin(store, "m", change("1", "first")).current.version == "1"
    store.put(version_key("m", "2"), store.get(version_key("m", "1")))
    with pytest.raises(DamagedError, match="is of version 1 of model 'm'"):
        model_file.find(store, "m", "2")


def test_what_was_there_before_is_signed_by_whoever_vouches_for_it(store: Store, use: Callable[..., Path]) -> None:
    keep(store, "m", "1")
    champions.begin(store, "m", change("1", "first"))
    use(ONE)
    assert model_file.sign_again(store, "m", "1") == model_file.find(store, "m", "1")
    assert champions.sign_again(store, "m") == champions.read(store, "m")


def test_key_is_in_no_record_and_in_no_text(store: Store, use: Callable[..., Path]) -> None:
    use(ONE)
    run = begun(store, "k")
    Group(run=run).save(4)
    assert ONE.encode() not in store.get(run.object_key)
    assert ONE not in repr(signatures.keyring())
    signed = json.loads(store.get(run.object_key))["checkpoints"][0]["signature"]
    assert len(signed) == 8 + 1 + 64


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_key_file_that_others_may_use_is_refused(use: Callable[..., Path], mode: int) -> None:
    path = use(ONE)
    path.chmod(mode)
    with pytest.raises(UserError, match=rf"{path}, which UNBROKEN_SIGNING_KEY_FILE names, may be used .*: chmod 600"):
        signatures.keyring()


def test_short_empty_and_missing_keys_are_refused(use: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = use("a password")
    for content in ("a password\n", "\n", f"{ONE}\nshort\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="must hold one key a line, each of at least 32 characters") as error:
            signatures.sign("checkpoint", {})
        assert "password" not in str(error.value)
    monkeypatch.setenv(signatures.VARIABLE, str(path.parent / "none"))
    with pytest.raises(UserError, match="none, which cannot be read: No such file"):
        signatures.keyring()


def test_a_shard_made_to_have_the_same_xxh3_is_believed_without_a_key_and_refused_with_one(
    use: Callable[..., Path],
) -> None:
    """It takes arithmetic and no luck to make one."""
    forged = encode_shard(["a"], {"x": np.zeros((1, 3), dtype=np.uint8)})
    info = ShardInfo(sha256="0" * 64, xxh3=fast_digest(forged), num_samples=1, num_bytes=len(forged))
    assert len(ShardCache(lambda _: forged, [info]).get(0)) == 1
    use(ONE)
    with pytest.raises(DamagedError, match=f"shard {info.sha256} is damaged on the store"):
        ShardCache(lambda _: forged, [info]).get(0)


def test_a_replay_does_not_pass_over_a_forged_checkpoint(store: Store, use: Callable[..., Path]) -> None:
    run = begun(store, "k")
    reference = Group(run=run).save(2)
    use(ONE)
    trainer = SimpleNamespace(run=run)
    with pytest.raises(UntrustedError, match="carries no signature"):
        replay._take_up(trainer, run.read(), reference)  # type: ignore[arg-type]  # it is not reached
