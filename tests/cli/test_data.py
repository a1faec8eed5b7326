"""`unbroken data`: the verbs as a user types them, on a dataset of the test's own."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from tests.cli.commands import complaint, unbroken
from tests.conftest import Stack
from tests.unit.data_source import data_config, local_source, write_csv
from tests.unit.tiny import Tiny
from training.data.activity import read_activity
from training.data.manifest import Manifest, load_shard, shard_key
from training.data.versions import versions
from training.data.withdrawn import record_of, withdrawn_key
from training.data.writer import write_dataset


@pytest.fixture
def name() -> str:
    return f"d{uuid.uuid4().hex[:12]}"


@pytest.fixture
def manifest(stack: Stack, tmp_path: Path, name: str) -> Manifest:
    write_csv(tmp_path / "raw/0.csv", range(100))
    config = data_config(name=name)
    return write_dataset(stack.store, local_source(tmp_path, config), config, Tiny()).manifest


def test_verify_names_damage_with_exit_code_6(stack: Stack, name: str, manifest: Manifest) -> None:
    done = unbroken(stack, "data", "verify", name)
    assert done.returncode == 0, done.stderr
    assert f"{manifest.digest}: all" in done.stdout
    victim = shard_key(name, manifest.splits["train"][0].sha256)
    stack.store.put(victim, stack.store.get(victim)[:-1])
    done = unbroken(stack, "data", "verify", f"{name}@{manifest.digest[:16]}")
    assert done.returncode == 6
    assert victim in done.stdout
    assert "`unbroken run` from the same source repairs what it needs" in done.stderr
    assert read_activity(stack.store, name).generation == 1, "or the shard stage would take it for finished"
    done = unbroken(stack, "data", "verify", name, "--json")
    assert done.returncode == 6
    assert json.loads(done.stdout)["damages"] == [{"key": victim, "reason": "damaged"}]


def test_withdraw_diff_rm_and_gc(stack: Stack, name: str, manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "ids").write_bytes(b"0.csv:5\r\n0.csv:9\r\n")
    done = unbroken(stack, *("data", "withdraw", name, "--file", str(tmp_path / "ids"), "--reason", "asked", "--json"))
    assert done.returncode == 0, done.stderr
    withdrawal = json.loads(done.stdout)
    assert withdrawal["versions_that_hold_them"] == [manifest.digest]
    assert withdrawal["models_that_used_them"] == []
    assert stack.store.read_versioned(withdrawn_key(name)).document["ids"]["0.csv:9"]["reason"] == "asked"
    assert withdrawal["num_samples_removed"] == 2
    new = withdrawal["new_digest"]
    rows = json.loads(unbroken(stack, "data", "diff", f"{name}@{manifest.digest}", f"{name}@{new}", "--json").stdout)
    assert sum(row["samples_only_a"] for row in rows) == 2
    assert unbroken(stack, "data", "rm", f"{name}@{manifest.digest}").returncode == 0
    done = unbroken(stack, "data", "gc", name, "--older-than", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["keys"]) >= withdrawal["num_shards_rewritten"]
    assert unbroken(stack, "data", "verify", f"{name}@{new}").returncode == 0


def test_withdrawal_is_told_although_mlflow_is_away(stack: Stack, name: str, manifest: Manifest) -> None:
    away = {"UNBROKEN_MLFLOW_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    record = record_of(load_shard(stack.store, name, manifest.splits["train"][0]).id_of(0))
    done = unbroken(stack, "data", "withdraw", name, record, variables=away)
    assert done.returncode == 3
    (digest,) = set(versions(stack.store, name)) - {manifest.digest}
    assert digest in done.stdout
    assert "MLflow does not answer" in done.stderr


@pytest.mark.parametrize("hours", ["-1", "nan", "inf", "1e5", "2e7", "1e15"])
def test_a_bound_that_is_no_time_names_its_option(stack: Stack, hours: str) -> None:
    said = complaint(unbroken(stack, "data", "gc", "d", f"--older-than={hours}"))
    assert f"older than {float(hours):g} hours: name 0 to 87600" in said


def test_strange_objects_beside_the_manifests_stop_nothing(stack: Stack, name: str, manifest: Manifest) -> None:
    stack.store.put(f"datasets/{name}/manifests/README.txt", b"not one of ours")
    listed = json.loads(unbroken(stack, "data", "ls", "--json").stdout)
    assert [row["digest"] for row in listed if row["name"] == name] == [manifest.digest]
    for arguments in (("verify", name), ("gc", name)):
        done = unbroken(stack, "data", *arguments)
        assert done.returncode == 0, done.stderr


def test_export_and_import(stack: Stack, name: str, manifest: Manifest, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = unbroken(stack, "data", "export", name, "--to", out, "--format", "parquet", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"name": name, "digest": manifest.digest}
    done = unbroken(stack, "data", "import", f"{name}-copy", out)
    assert done.stdout.split() == [f"{name}-copy", manifest.digest]
    assert json.loads(unbroken(stack, "data", "show", f"{name}-copy", "--json").stdout) == json.loads(
        manifest.to_bytes()
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "no-such-dataset"), "no dataset version is meant by 'no-such-dataset'"),
        (("verify", ""), "name a dataset, or one of its versions as NAME@DIGEST"),
        (("gc", "no-such-dataset"), "no dataset 'no-such-dataset'"),
        (("withdraw", "no-such-dataset"), "name at least one record id"),
        (("withdraw", "no-such-dataset", "--file", "no-such-file"), "cannot read no-such-file"),
        (("verify-run", "no-such-run"), "no run with a key that begins with"),
        (("import", "x/y", "."), "NAME = 'x/y' must be"),
    ],
)
def test_mistakes_are_named(stack: Stack, arguments: tuple[str, ...], says: str) -> None:
    assert says in complaint(unbroken(stack, "data", *arguments))
