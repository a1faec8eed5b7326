"""Model versions in MLflow's registry: made once per weights of a run, and found by tags."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.mlflow_client import DATASET_TAG, MACHINE_LEARNING, RUN_KEY_TAG, WEIGHTS_TAG, ask, connect
from training.documents import sha256_hex
from training.errors import DamagedError, InfrastructureError, UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from tasks.tracking import Tracker

DRILL_TAG = "unbroken.drill"
"""On a version: "green" or "red". With .id, .subject, .code, .faults and .report_sha256 (docs/drill.md)."""
GATE_TAG = "unbroken.gate"
"""On a version: "passed" or "refused", as it was judged last. With .decision, .champion and .reason."""
ALIASES_DUE_TAG = "unbroken.aliases_due"
"""On a version that has not been given its aliases yet: its maker is about to, or has died."""
MODEL_TAG = "unbroken.model_sha256"
"""On a version: of its model file on the store. With unbroken.model_bytes."""
PROGRAM = "data/model.pt2"
"""Among the files of a model in MLflow."""
MODEL_BYTES_TAG = "unbroken.model_bytes"


def ensure_model_version(
    uri: str,
    name: str,
    tracker: Tracker,
    *,
    run_key: str,
    weights_sha256: str,
    tags: Mapping[str, str],
    save: Callable[[Path, Any], None],
) -> ModelVersion:
    """The registry's version of these weights of this run key, made if there is none.

    `save(folder, mlflow_model)` writes the model.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    client = tracker.client
    identity = {RUN_KEY_TAG: run_key, WEIGHTS_TAG: weights_sha256}
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise InfrastructureError(f"MLflow refused to make model {name!r}: {error}") from error
    by_key = _by_key(run_key, weights_sha256)
    existing = _only_version(client, name, by_key)
    if existing is not None:
        return existing
    found = client.search_logged_models([tracker.experiment_id], filter_string=by_key)
    ready = [model for model in found if model.status == "READY" and model.name == name]
    if ready:
        model = ready[0]
    else:
        model = client.create_logged_model(
            tracker.experiment_id,
            name=name,
            source_run_id=tracker.run_id,
            tags=identity,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            save(path, Model(model_id=model.model_id, run_id=tracker.run_id))
            digest = sha256_hex((path / PROGRAM).read_bytes())
            client.log_model_artifacts(model.model_id, str(path))
        client.set_logged_model_tags(model.model_id, {MODEL_TAG: digest})  # in its database: files lie in the bucket
        model = client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(tracker.run_id, [LoggedModelOutput(model.model_id, step=0)])
    made = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=tracker.run_id,
        model_id=model.model_id,
        tags={**identity, **tags, **_digest_of(model), ALIASES_DUE_TAG: "true"},
    )
    return _only_version(client, name, by_key) or made


def _digest_of(model: LoggedModel) -> dict[str, str]:
    """As a tag of a version; nothing for a model that an earlier release logged."""
    return {MODEL_TAG: model.tags[MODEL_TAG]} if MODEL_TAG in model.tags else {}


def _only_version(client: MlflowClient, name: str, by_key: str) -> ModelVersion | None:
    """Racing starters make twins. All agree on the lowest number and delete the others, whoever made them: that one may
    be dead. One that a person has given an alias meanwhile is left."""
    first, *twins = _versions(client, name, by_key) or (None,)
    named = {str(number) for number in client.get_registered_model(name).aliases.values()} if twins else ()
    for twin in twins:
        if str(twin.version) not in named:
            _delete_version(client, name, str(twin.version))
    return first


def _versions(client: MlflowClient, name: str, by_key: str) -> list[ModelVersion]:
    found = client.search_model_versions(f"name = '{name}' and {by_key}")
    return sorted(found, key=lambda version: int(version.version))


def _delete_version(client: MlflowClient, name: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # a racing starter was first
            raise


def is_newest(client: MlflowClient, name: str, version: ModelVersion) -> bool:
    """Whether no other weights were registered after these. A twin of this version is about to go."""
    return all(
        int(other.version) <= int(version.version) or _identity(other) == _identity(version)
        for other in client.search_model_versions(f"name = '{name}'")
    )


def _identity(version: ModelVersion) -> tuple[str | None, str | None]:
    return version.tags.get(RUN_KEY_TAG), version.tags.get(WEIGHTS_TAG)


def versions_trained_on(uri: str, dataset_digests: Collection[str]) -> list[str]:
    """The registered versions that were trained on one of these dataset versions, as `name version 3`.

    By their tag: a run may have been removed since.
    """
    client = connect(uri)
    queries = [f"tags.`{DATASET_TAG}` = '{digest}'" for digest in dataset_digests]
    found = [version for query in queries for version in ask(lambda: client.search_model_versions(query))]  # noqa: B023
    return [f"{version.name} version {version.version}" for version in found]


def aliases_of(client: MlflowClient, name: str, version: str) -> tuple[str, ...]:
    """The aliases that a version has now."""
    model = ask(lambda: client.get_registered_model(name))
    return tuple(sorted(alias for alias, number in model.aliases.items() if str(number) == version))


def has_version(uri: str, name: str, *, run_key: str, weights_sha256: str) -> bool:
    """Whether the registry has a version of these weights of this run."""
    by_key = _by_key(run_key, weights_sha256)
    return bool(ask(lambda: _versions(connect(uri), name, by_key)))


def _by_key(run_key: str, weights_sha256: str) -> str:
    return f"tags.`{RUN_KEY_TAG}` = '{run_key}' and tags.`{WEIGHTS_TAG}` = '{weights_sha256}'"


def list_versions(uri: str) -> list[dict[str, Any]]:
    """Every model version of this project, with its aliases."""
    client = connect(uri)
    rows: list[dict[str, Any]] = []
    for model in ask(lambda: client.search_registered_models()):
        aliases: dict[str, list[str]] = {}
        for alias, version in model.aliases.items():
            aliases.setdefault(str(version), []).append(alias)
        for version in client.search_model_versions(f"name = '{model.name}'"):
            number = str(version.version)
            run_key = version.tags.get(RUN_KEY_TAG, "")
            rows.append({"name": model.name, "version": number, "aliases": aliases.get(number, []), "run_key": run_key})
    return rows


def attach_files(
    uri: str, name: str, version: str, tags: Mapping[str, str], paths: Sequence[Path], *, folder: str
) -> None:
    """Files among the artifacts of the run that a version came from; then tags on the version, which speak of them.

    Raises `InfrastructureError` if MLflow is away.
    """
    client = connect(uri)
    run_id = str(ask(lambda: client.get_model_version(name, version)).run_id)
    for path in paths:
        ask(lambda: client.log_artifact(run_id, str(path), folder))  # noqa: B023
    for key, value in tags.items():
        ask(lambda: client.set_model_version_tag(name, version, key, value))  # noqa: B023


def describe_version(uri: str, name: str, version: str, text: str, *, heading: str) -> bool:
    """Set a version's description, which MLflow shows as Markdown; False if there is one that does not begin with
    `heading`: a person's."""
    client = connect(uri)
    found = str(ask(lambda: client.get_model_version(name, version)).description or "")
    if found and not found.startswith(heading):
        return False
    if found != text:
        ask(lambda: client.update_model_version(name, version, text))
    return True


def find_version(uri: str, text: str, *, what: str = "train.warm_start") -> tuple[str, str]:
    """(name, version) that `NAME@ALIAS`, `NAME@VERSION` or `NAME/VERSION` means.

    Raises `UserError`, naming `what` asked for it, if the registry has none.
    """
    from mlflow.exceptions import MlflowException

    name, sign, which = text.partition("@" if "@" in text else "/")
    if not name or not which:
        raise UserError(f"{what} = {text!r}: must read NAME@ALIAS or NAME/VERSION")
    client = connect(uri)
    is_alias = sign == "@" and not which.isdecimal()
    find = client.get_model_version_by_alias if is_alias else client.get_model_version
    try:
        return name, str(find(name, which).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise UserError(f"{what} = {text!r}: the registry has no such model version") from error
        raise InfrastructureError(f"MLflow does not answer as it should: {error}") from error


def origin_of(uri: str, name: str, version: str) -> tuple[str, str]:
    """The run that gave a version, and its weights' digest. Raises `UserError` if none of this project's did."""
    found = ask(lambda: connect(uri).get_model_version(name, version))
    if not {RUN_KEY_TAG, WEIGHTS_TAG} <= found.tags.keys():
        raise UserError(f"model {name!r} version {version} was not made by Unbroken: it has no tag {RUN_KEY_TAG}")
    return str(found.tags[RUN_KEY_TAG]), str(found.tags[WEIGHTS_TAG])


def require_run_key(uri: str, name: str, version: str, run_key: str) -> None:
    """Raises `UserError` if MLflow has no such version, or another run's of that number."""
    _, found = find_version(uri, f"{name}/{version}", what="VERSION")
    if origin_of(uri, name, found)[0] != run_key:
        raise UserError(
            f"model {name!r} version {version} is of another run in MLflow than on the store ({run_key[:12]}): the"
            " registry was emptied, and numbers its versions anew"
        )


def tag_version(uri: str, name: str, version: str, tag: str, value: str | None) -> None:
    """Set a version's tag, or delete it if `value` is None."""
    client = connect(uri)
    if value is None:
        ask(lambda: client.delete_model_version_tag(name, version, tag))
    else:
        ask(lambda: client.set_model_version_tag(name, version, tag, value))


def program_of(uri: str, version: ModelVersion) -> tuple[bytes, Any]:
    """The exported program among a version's files, and MLflow's signature of it. Raises `DamagedError` if it is not
    what was registered."""
    import mlflow
    from mlflow.models import Model

    with tempfile.TemporaryDirectory() as folder:
        path = ask(
            lambda: mlflow.artifacts.download_artifacts(
                artifact_uri=str(version.source), dst_path=folder, tracking_uri=uri
            )
        )
        data = (Path(path) / PROGRAM).read_bytes()
        if version.tags.get(MODEL_TAG, digest := sha256_hex(data)) != digest:
            raise DamagedError(
                f"{version.source}: its {PROGRAM} is not what was registered as version {version.version}"
            )
        return data, Model.load(path).signature


def tags_of(uri: str, name: str, version: str) -> dict[str, str]:
    """All tags of a version. Raises `InfrastructureError` if MLflow is away."""
    return dict(ask(lambda: connect(uri).get_model_version(name, version)).tags)


def version_url(uri: str, name: str, version: str) -> str:
    return f"{uri}/#/models/{name}/versions/{version}{MACHINE_LEARNING}"
