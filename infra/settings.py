"""Where the stack's parts are: environment variables, then `unbroken.toml`, then the running local stack."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.passwords import password_environment
from infra.slurm.site import Site
from training import signatures
from training.documents import parse, read_document, read_toml
from training.errors import DamagedError, InfrastructureError, UserError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_BUCKET = "unbroken"
RESULTS_BLOCK = "unbroken-results"
KNOWN: dict[str, tuple[str, ...]] = {
    "s3": ("endpoint", "bucket", "prefix", "region"),
    "mlflow": ("uri", "gate"),
    "prefect": ("api_url",),
    "ports": ("s3", "mlflow", "prefect", "monitor", "prometheus", "alertmanager"),
    "watch": ("presets",),
    "engine": ("kind",),
    "monitoring": (
        *("windows", "serving", "webhook", "slack_url_file", "slack_channel"),
        *("email_to", "email_from", "smtp", "smtp_user", "smtp_password_file"),
    ),
    "signing": ("key_file",),
    "stack": ("authentication",),
    "slurm": ("partition", "account", "qos", "commands", "priorities"),
}
KINDS: dict[str, tuple[type, str]] = {
    "ports": (int, "a number"),
    "stack": (bool, "true or false"),
    "watch": (list, "a list of presets"),
    "monitoring.serving": (list, 'a list of addresses such as "127.0.0.1:8000"'),
    "slurm.priorities": (dict, 'a table such as {high = "partition=NAME", low = "qos=NAME"}'),
}
"""Of the values of a table, or of one; text if it is not named here."""
ENGINES = ("local", "slurm")
SLURM_TEXTS = ("partition", "account", "qos", "commands")
FOREIGN_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
ADDRESSES = {"s3": "endpoint", "mlflow": "uri", "prefect": "api_url"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One place for every address. Credentials are not among them: those come from the standard AWS chain."""

    home: Path
    s3_endpoint: str | None
    s3_bucket: str
    s3_prefix: str
    s3_region: str
    maybe_mlflow_uri: str | None
    maybe_prefect_api_url: str | None
    s3_is_local: bool
    engine: str = "local"
    slurm: Site = field(default_factory=Site)
    maybe_signing_key_file: str | None = None
    """The path, never a key."""
    passwords: tuple[str, ...] = ()
    """The parts of the local stack that ask for one."""

    @property
    def mlflow_uri(self) -> str:
        return _required(self.maybe_mlflow_uri, "MLflow server", "[mlflow] uri", "UNBROKEN_MLFLOW_URI")

    @property
    def prefect_api_url(self) -> str:
        return _required(self.maybe_prefect_api_url, "Prefect server", "[prefect] api_url", "UNBROKEN_PREFECT_API_URL")

    @property
    def prefect_ui_url(self) -> str:
        return self.prefect_api_url.removesuffix("/api")


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the stack's own file may say."""

    ports: dict[str, int] = field(default_factory=dict)
    is_wanted: bool = False
    s3: dict[str, str] = field(default_factory=dict)
    mlflow: dict[str, str] = field(default_factory=dict)
    prefect: dict[str, str] = field(default_factory=dict)


def home() -> Path:
    """The folder of the local stack: $UNBROKEN_HOME, the nearest `.unbroken` upward, else the project's own."""
    if os.environ.get("UNBROKEN_HOME"):
        return Path(os.environ["UNBROKEN_HOME"]).resolve()
    for folder in (Path.cwd(), *Path.cwd().parents):
        if (folder / ".unbroken").is_dir():
            return folder / ".unbroken"
    root = PROJECT_ROOT if (PROJECT_ROOT / "pyproject.toml").is_file() else Path.cwd()
    return root / ".unbroken"


def load_settings() -> Settings:
    """Raises `UserError` for a settings file that is wrong, `InfrastructureError` if no S3 storage is known."""
    folder = home()
    file = read_settings_file()
    local = read_state(folder)

    def find(part: str, key: str) -> str | None:
        variable = os.environ.get(f"UNBROKEN_{part}_{key}".upper())
        return variable or file.get(part, {}).get(key) or local.get(part, {}).get(key)

    external_s3 = "s3" in external_parts(file)
    if not external_s3 and "s3" not in local:
        raise InfrastructureError(
            "the local stack is not running: start it with `unbroken up` (or `make up`), or name existing servers"
            " in unbroken.toml"
        )
    prefix = (find("s3", "prefix") or "").strip("/")
    return Settings(
        home=folder,
        s3_endpoint=_endpoint(file) if external_s3 else find("s3", "endpoint"),
        s3_bucket=find("s3", "bucket") or DEFAULT_BUCKET,
        s3_prefix=f"{prefix}/" if prefix else "",
        s3_region=find("s3", "region") or "us-east-1",
        maybe_mlflow_uri=find("mlflow", "uri"),
        maybe_prefect_api_url=find("prefect", "api_url"),
        s3_is_local=not external_s3,
        engine=_engine(find("engine", "kind") or "local"),
        slurm=Site(
            **{name: find("slurm", name) or "" for name in SLURM_TEXTS},
            priorities=file.get("slurm", {}).get("priorities", {}),
        ),
        maybe_signing_key_file=_signing_key_file(file),
        passwords=tuple(part for part in local.get("passwords", ()) if part not in external_parts(file)),
    )


def external_parts(file: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
    """The parts that environment or file place on existing servers: the local stack does not start those."""
    found = {
        part
        for part, key in ADDRESSES.items()
        if os.environ.get(f"UNBROKEN_{part}_{key}".upper()) or file.get(part, {}).get(key)
    }
    if file.get("s3", {}).get("bucket"):  # a bucket without an endpoint is one on AWS
        found.add("s3")
    return frozenset(found)


def _engine(kind: str) -> str:
    if kind not in ENGINES:
        raise UserError(
            f"[engine] kind = {kind!r} in unbroken.toml (or UNBROKEN_ENGINE_KIND) must be one of {', '.join(ENGINES)}"
        )
    return kind


def _signing_key_file(file: Mapping[str, Mapping[str, Any]]) -> str | None:
    """$UNBROKEN_SIGNING_KEY_FILE, or `[signing] key_file`, a path beside the settings file."""
    if os.environ.get(signatures.VARIABLE):
        return str(Path(os.environ[signatures.VARIABLE]).resolve())
    named, path = file.get("signing", {}).get("key_file"), settings_path()
    return str((path.parent / named).resolve()) if named and path is not None else None


def signing_environment(settings: Settings) -> dict[str, str]:
    """What a node needs besides the store's address: where the key lies."""
    return {signatures.VARIABLE: settings.maybe_signing_key_file} if settings.maybe_signing_key_file else {}


def _endpoint(file: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Of an S3 that is not the local one; None is AWS."""
    endpoint = os.environ.get("UNBROKEN_S3_ENDPOINT") or file.get("s3", {}).get("endpoint")
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"S3 endpoint {endpoint!r} must begin with http:// or https://")
    return endpoint


def environment(settings: Settings) -> dict[str, str]:
    """What a process, or a person's shell, needs so that every library finds the stack."""
    found = {
        "UNBROKEN_HOME": str(settings.home),
        "AWS_DEFAULT_REGION": settings.s3_region,
        "AWS_EC2_METADATA_DISABLED": "true",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PREFECT_HOME": str(settings.home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": f"s3-bucket/{RESULTS_BLOCK}",
        "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500",  # what its server answers while its disk is full
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "tasks,training",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        **signing_environment(settings),
    }
    if settings.s3_is_local:
        found["AWS_SHARED_CREDENTIALS_FILE"] = str(credentials_path(settings.home))
    if settings.s3_endpoint:
        found["AWS_ENDPOINT_URL_S3"] = settings.s3_endpoint
    if settings.maybe_mlflow_uri:
        found["MLFLOW_TRACKING_URI"] = settings.maybe_mlflow_uri
    if settings.maybe_prefect_api_url:
        found["PREFECT_API_URL"] = settings.maybe_prefect_api_url
    return found


def activate(settings: Settings) -> None:
    """Put `environment` into this process, and passwords. Keys of another store, if set, would shadow the local
    stack's own."""
    os.environ.update(environment(settings))
    os.environ.update(password_environment(settings.home, settings.passwords))
    if settings.s3_is_local:
        for name in FOREIGN_KEYS:
            os.environ.pop(name, None)


def credentials_path(folder: Path) -> Path:
    return folder / "credentials"


def state_path(folder: Path) -> Path:
    return folder / "stack.json"


def read_state(folder: Path) -> dict[str, Any]:
    """What `up` noted of the local stack; empty if it was never up."""
    path = state_path(folder)
    try:
        found = read_document(path.read_bytes(), what=str(path)) if path.is_file() else {}
        parse(_State, found)
    except DamagedError as error:
        raise InfrastructureError(
            f"{path} is damaged: remove it, and start the stack again with `unbroken up`"
        ) from error
    return found


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    new = state_path(folder).with_suffix(".new")
    new.write_text(json.dumps(state, indent=1))
    new.replace(state_path(folder))


def read_settings_file() -> dict[str, dict[str, Any]]:
    """The settings file: $UNBROKEN_SETTINGS, or the nearest `unbroken.toml` upward. Empty if there is none."""
    path = settings_path()
    if path is None:
        return {}
    document = read_toml(path)
    for part, table in document.items():
        _check_known(path, part, KNOWN)
        if not isinstance(table, Mapping):
            raise UserError(f"{path}: {part!r} must be a table, as in [{part}]")
        for key, value in table.items():
            _check_known(path, key, KNOWN[part], table=part)
            kind, words = KINDS.get(f"{part}.{key}") or KINDS.get(part, (str, "text"))
            if not _is_of(kind, value):
                raise UserError(f"{path}: {part}.{key} = {value!r} must be {words}")
    return document


def watched_presets() -> list[str]:
    """The presets whose sources are watched for new data: names, or paths of TOML files beside the settings file."""
    presets = read_settings_file().get("watch", {}).get("presets", [])
    path = settings_path()
    return [str(path.parent / name) if path is not None and name.endswith(".toml") else name for name in presets]


def gate_policy_path() -> Path:
    """What a model must show to become champion: $UNBROKEN_MLFLOW_GATE, `[mlflow] gate` (a path beside the settings
    file), else mlflow/gate.toml."""
    named, path = read_settings_file().get("mlflow", {}).get("gate"), settings_path()
    if os.environ.get("UNBROKEN_MLFLOW_GATE"):
        return Path(os.environ["UNBROKEN_MLFLOW_GATE"])
    return path.parent / named if named and path is not None else PROJECT_ROOT / "mlflow" / "gate.toml"


def wants_authentication() -> bool:
    """`[stack] authentication`, or $UNBROKEN_STACK_AUTHENTICATION. Raises `UserError`."""
    text = os.environ.get("UNBROKEN_STACK_AUTHENTICATION", "")
    if text not in ("", "true", "false"):
        raise UserError(f"UNBROKEN_STACK_AUTHENTICATION = {text!r} must be true or false")
    return text == "true" if text else bool(read_settings_file().get("stack", {}).get("authentication"))


def monitoring_settings() -> dict[str, Any]:
    """The table `[monitoring]`; UNBROKEN_MONITORING_WEBHOOK and the like go before. Files lie beside the settings
    file, unless their paths are whole."""
    found = dict(read_settings_file().get("monitoring", {}))
    for name in KNOWN["monitoring"]:
        if value := os.environ.get(f"UNBROKEN_MONITORING_{name}".upper()):
            found[name] = value.split(",") if name == "serving" else value
    path = settings_path()
    for name in ("windows", "slack_url_file", "smtp_password_file"):
        if name in found and path is not None:
            found[name] = str(path.parent / found[name])
    return found


def settings_path() -> Path | None:
    """Of the settings file, if there is one."""
    if os.environ.get("UNBROKEN_SETTINGS"):
        return Path(os.environ["UNBROKEN_SETTINGS"])
    candidates = (folder / "unbroken.toml" for folder in (Path.cwd(), *Path.cwd().parents))
    return next((path for path in candidates if path.is_file()), None)


def _is_of(kind: type, value: Any) -> bool:
    """A list is one of texts, and a table one of Slurm's options."""
    if isinstance(value, list):
        return kind is list and all(type(item) is str for item in value)
    if isinstance(value, Mapping):
        return kind is dict and all(str(option).startswith(("partition=", "qos=")) for option in value.values())
    return type(value) is kind


def _check_known(path: Path, name: str, known: Any, *, table: str = "") -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name[:100], list(known), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"
    raise UserError(f"{path}: unknown key {f'{table}.{name}' if table else name!r}{hint}")


def _required(value: str | None, part: str, key: str, variable: str) -> str:
    if value is None:
        raise InfrastructureError(
            f"no {part} is known: start the local stack with `unbroken up` (or `make up`), or name an existing one"
            f" in unbroken.toml, {key}, or in {variable}"
        )
    return value
