"""`[stack] authentication`: strangers get 401 of Prefect and MLflow, and what is the stack's own works as before."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from infra.passwords import PasswordRequired, make_passwords, password_path, read_password, shell_lines
from infra.settings import read_settings_file, wants_authentication
from tests.conftest import Stack, running_stack
from tests.waiting import wait_until
from training.errors import UserError


def basic(user: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(user.encode()).decode()}


@pytest.fixture
def guarded() -> TestClient:
    async def echo(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    async def hello(_: object) -> PlainTextResponse:
        return PlainTextResponse("hello")

    app = Starlette(
        routes=[
            Route("/health", hello, methods=["GET", "POST"]),
            Route("/health/x", hello),
            Route("/", hello),
            WebSocketRoute("/socket", echo),
        ]
    )
    return TestClient(PasswordRequired(app, realm="it", user="unbroken:word", open_path="/health"))


def test_only_the_password_opens(guarded: TestClient) -> None:
    assert guarded.get("/", headers=basic("unbroken:word")).text == "hello"
    assert guarded.get("/health").text == "hello"
    refused = guarded.get("/")
    assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, 'Basic realm="it"')
    for headers in (
        basic("unbroken:other"),
        basic("other:word"),
        {"Authorization": "Bearer word"},
        {"Authorization": ""},
    ):
        assert guarded.get("/", headers=headers).status_code == 401
    twice = [("Authorization", "Basic x"), ("Authorization", basic("unbroken:word")["Authorization"])]
    assert guarded.get("/", headers=twice).status_code == 401  # type: ignore[arg-type]  # httpx takes pairs
    assert guarded.post("/health").status_code == 401
    assert guarded.get("/health/x").status_code == 401


def test_sockets_are_behind_it_too(guarded: TestClient) -> None:
    with guarded.websocket_connect("/socket", headers=basic("unbroken:word")) as socket:
        assert socket.receive_text() == "hello"
    with pytest.raises(WebSocketDisconnect), guarded.websocket_connect("/socket"):
        pass


def test_passwords_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    make_passwords(tmp_path, ["mlflow", "prefect"])
    first = {part: read_password(tmp_path, part) for part in ("mlflow", "prefect")}
    assert len(set(first.values())) == 2
    assert min(map(len, first.values())) == 32
    make_passwords(tmp_path, ["mlflow", "prefect"])
    assert {part: read_password(tmp_path, part) for part in first} == first
    for part in first:
        assert stat.S_IMODE(password_path(tmp_path, part).stat().st_mode) == 0o600
    lines = "\n".join(shell_lines(tmp_path, first))
    assert not any(word in lines for word in first.values())
    shown = subprocess.run(
        ["sh", "-c", f"{lines}\necho $PREFECT_API_AUTH_STRING $MLFLOW_TRACKING_USERNAME:$MLFLOW_TRACKING_PASSWORD"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.split() == [f"unbroken:{first['prefect']}", f"unbroken:{first['mlflow']}"]


def test_setting_is_true_or_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "unbroken.toml"
    monkeypatch.setenv("UNBROKEN_SETTINGS", str(path))
    path.write_text("[stack]\nauthentication = true\n")
    assert wants_authentication()
    monkeypatch.setenv("UNBROKEN_STACK_AUTHENTICATION", "false")
    assert not wants_authentication()
    monkeypatch.setenv("UNBROKEN_STACK_AUTHENTICATION", "yes")
    with pytest.raises(UserError, match="UNBROKEN_STACK_AUTHENTICATION = 'yes' must be true or false"):
        wants_authentication()
    path.write_text('[stack]\nauthentication = "true"\n')
    with pytest.raises(UserError, match=r"stack\.authentication = 'true' must be true or false"):
        read_settings_file()


# ---- the real servers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    os.environ["UNBROKEN_STACK_AUTHENTICATION"] = "true"
    try:
        with running_stack(tmp_path_factory.mktemp("locked") / "home") as running:
            yield running  # at its end, the passwords are looked for in all that it left
    finally:
        os.environ.pop("UNBROKEN_STACK_AUTHENTICATION", None)


def status_of(url: str, *, user: str = "", body: object = None) -> int:
    headers = {"Content-Type": "application/json", **(basic(user) if user else {})}
    data = json.dumps(body).encode() if body is not None else None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_strangers_are_refused_and_a_pipeline_runs(locked_stack: Stack) -> None:
    stack = locked_stack
    mlflow, prefect = stack.settings.mlflow_uri, stack.settings.prefect_api_url
    asked: dict[str, tuple[str, object]] = {
        f"{mlflow}/api/2.0/mlflow/experiments/search": ("mlflow", {"max_results": 1}),
        f"{mlflow}/ajax-api/2.0/mlflow/experiments/search": ("mlflow", {"max_results": 1}),
        f"{mlflow}/api/2.0/mlflow-artifacts/artifacts": ("mlflow", None),
        f"{mlflow}/": ("mlflow", None),
        f"{prefect}/flow_runs/count": ("prefect", {}),
        f"{prefect}/work_pools/local": ("prefect", None),
    }
    for url, (part, body) in asked.items():
        assert status_of(url, body=body) == 401, url
        assert status_of(url, body=body, user="unbroken:guess") == 401, url
        assert status_of(url, body=body, user=f"unbroken:{read_password(stack.home, part)}") != 401, url
    assert (status_of(f"{mlflow}/health"), status_of(f"{prefect}/health")) == (200, 200)

    said = stack.command("up")
    assert f"user unbroken, with the password in {password_path(stack.home, 'mlflow')}" in said.stdout, said.stderr
    wait_until(lambda: stack.command("status").returncode == 0, what="the whole stack to be well")
    done = stack.command("run", "digits", "--set", "train.steps=4", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    monitor = next(
        service["url"] for service in json.loads(stack.command("up", "--json").stdout) if service["name"] == "monitor"
    )

    def completed_runs() -> bool:
        with urllib.request.urlopen(f"{monitor.removesuffix('/metrics')}/metrics", timeout=120) as reply:
            return 'unbroken_flow_runs{state="completed"} 1' in reply.read().decode()

    wait_until(completed_runs, what="the monitor to count the flow run")
    changed = subprocess.run(
        [*said.args[:1], "up"],
        env={**stack.environment(), "UNBROKEN_STACK_AUTHENTICATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert changed.returncode == 2
    assert "[stack] authentication was changed: `unbroken down`, then `unbroken up` again" in changed.stderr
