"""Which setting wins, and what is said of a settings file that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.settings import environment, home, load_settings, signing_environment, state_path, watched_presets
from training.errors import InfrastructureError, UserError

LOCAL = {
    "ports": {"s3": 1},
    "s3": {"endpoint": "http://127.0.0.1:1", "bucket": "unbroken"},
    "mlflow": {"uri": "http://127.0.0.1:2"},
    "prefect": {"api_url": "http://127.0.0.1:3/api"},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, no settings in the environment, and a stack's home of its own."""
    for part in (
        "S3_ENDPOINT",
        "S3_BUCKET",
        "S3_PREFIX",
        "S3_REGION",
        "MLFLOW_URI",
        "PREFECT_API_URL",
        "SETTINGS",
        "SIGNING_KEY_FILE",
    ):
        monkeypatch.delenv(f"UNBROKEN_{part}", raising=False)
    monkeypatch.setenv("UNBROKEN_HOME", str(tmp_path / ".unbroken"))
    (tmp_path / ".unbroken").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def local_stack(folder: Path) -> None:
    state_path(folder / ".unbroken").write_text(json.dumps(LOCAL))


@pytest.mark.usefixtures("local_stack")
def test_local_stack_is_found_without_any_setting() -> None:
    settings = load_settings()
    assert settings.s3_endpoint == "http://127.0.0.1:1"
    assert settings.mlflow_uri == "http://127.0.0.1:2"
    assert settings.prefect_api_url == "http://127.0.0.1:3/api"
    assert settings.s3_is_local


@pytest.mark.usefixtures("local_stack")
def test_file_wins_over_local_stack_and_environment_over_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "unbroken.toml").write_text('[mlflow]\nuri = "http://file"\n[s3]\nendpoint = "http://file"\n')
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    from_file = load_settings()
    assert (from_file.mlflow_uri, from_file.s3_endpoint) == ("http://file", "http://file")
    assert not from_file.s3_is_local
    assert from_file.prefect_api_url == "http://127.0.0.1:3/api", "what the file leaves out is the local stack's"

    monkeypatch.setenv("UNBROKEN_MLFLOW_URI", "http://environment")
    monkeypatch.setenv("UNBROKEN_S3_BUCKET", "other")
    both = load_settings()
    assert (both.mlflow_uri, both.s3_bucket, both.s3_endpoint) == ("http://environment", "other", "http://file")


@pytest.mark.usefixtures("local_stack")
def test_key_file_lies_beside_the_settings_and_every_process_and_node_is_told_where(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert signing_environment(load_settings()) == {}
    (folder / "unbroken.toml").write_text('[signing]\nkey_file = "signing.key"\n')
    (folder / "a").mkdir()
    monkeypatch.chdir(folder / "a")
    named = {"UNBROKEN_SIGNING_KEY_FILE": str(folder / "signing.key")}
    assert signing_environment(load_settings()) == named
    assert named.items() <= environment(load_settings()).items()
    monkeypatch.setenv("UNBROKEN_SIGNING_KEY_FILE", "other.key")
    assert signing_environment(load_settings()) == {"UNBROKEN_SIGNING_KEY_FILE": str(folder / "a" / "other.key")}


@pytest.mark.usefixtures("local_stack")
def test_s3_without_endpoint_means_aws_and_not_the_local_store(folder: Path) -> None:
    (folder / "unbroken.toml").write_text('[s3]\nbucket = "ml"\nregion = "eu-central-1"\n')
    settings = load_settings()
    assert settings.s3_endpoint is None
    assert (settings.s3_bucket, settings.s3_region, settings.s3_is_local) == ("ml", "eu-central-1", False)


@pytest.mark.usefixtures("local_stack")
def test_prefix_is_a_folder_however_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("team-a", "/team-a/", "team-a/"):
        monkeypatch.setenv("UNBROKEN_S3_PREFIX", text)
        assert load_settings().s3_prefix == "team-a/"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[s3]\nendpont = "x"', "unknown key 's3.endpont' (did you mean 'endpoint'?)"),
        ('[prefct]\napi_url = "x"', "unknown key 'prefct' (did you mean 'prefect'?)"),
        ("[ports]\nzzz = 1", "unknown key 'ports.zzz' (known: s3, mlflow, prefect, monitor, prometheus, alertmanager)"),
        ("[s3]\nbucket = 5", "s3.bucket = 5 must be text"),
        ('[ports]\nmlflow = "5000"', "ports.mlflow = '5000' must be a number"),
        ("[ports]\nmlflow = true", "ports.mlflow = True must be a number"),
        ('[watch]\npresets = "digits"', "watch.presets = 'digits' must be a list of presets"),
        ("[watch]\npresets = [1]", "watch.presets = [1] must be a list of presets"),
        ('[slurm]\npriorities = {high = "gpu"}', "slurm.priorities = {'high': 'gpu'} must be a table such as"),
        ("[slurm]\npartition = 1", "slurm.partition = 1 must be text"),
        ('s3 = "http://x"', "'s3' must be a table, as in [s3]"),
        ("[s3\n", "unbroken.toml: "),
    ],
)
def test_wrong_settings_file_is_named_with_its_key(folder: Path, text: str, complaint: str) -> None:
    (folder / "unbroken.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_settings()
    assert complaint in str(caught.value)
    assert str(folder / "unbroken.toml") in str(caught.value)


def test_an_engine_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_S3_ENDPOINT", "http://elsewhere")
    assert load_settings().engine == "local"
    monkeypatch.setenv("UNBROKEN_ENGINE_KIND", "slurn")
    with pytest.raises(UserError, match=r"\[engine\] kind = 'slurn' .* must be one of local, slurm"):
        load_settings()


def test_watched_presets_lie_beside_the_settings_file(folder: Path) -> None:
    assert watched_presets() == []
    (folder / "unbroken.toml").write_text('[watch]\npresets = ["digits", "mine/a.toml", "/b.toml"]\n')
    assert watched_presets() == ["digits", str(folder / "mine/a.toml"), "/b.toml"]


def test_settings_file_that_is_named_must_be_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_SETTINGS", str(folder / "nowhere.toml"))
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        load_settings()


def test_without_a_stack_the_command_that_starts_it_is_named() -> None:
    with pytest.raises(InfrastructureError, match="`unbroken up`"):
        load_settings()


def test_without_mlflow_its_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNBROKEN_S3_ENDPOINT", "http://elsewhere")
    settings = load_settings()
    with pytest.raises(InfrastructureError, match="UNBROKEN_MLFLOW_URI"):
        _ = settings.mlflow_uri


def test_half_written_state_is_an_error_that_names_the_file(folder: Path) -> None:
    path = state_path(folder / ".unbroken")
    path.write_text(json.dumps(LOCAL)[:40])
    with pytest.raises(InfrastructureError, match=r"stack\.json"):
        load_settings()


def test_home_is_the_nearest_one_upward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNBROKEN_HOME")
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert home() == folder / ".unbroken"


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 100_000, '{"s3": []}', '{"ports": {"s3": "a"}}', '{"mlflow": {"uri": 3}}']
)
def test_a_damaged_note_of_the_stack_is_named(folder: Path, text: str) -> None:
    state_path(folder / ".unbroken").write_text(text)
    with pytest.raises(InfrastructureError, match=r"stack\.json is damaged: remove it"):
        load_settings()
