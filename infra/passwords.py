"""Passwords of the local stack's Prefect and MLflow: made once, in files of mode 600, handed on by environment alone.

No password is in a configuration, a command line or the file that shells read: that one says where to read it.
"""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from infra.local.files import write_whole

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

PARTS = ("mlflow", "prefect")
USER = "unbroken"
_PLACE = "{}"
_VARIABLES = {
    "mlflow": {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": _PLACE},
    "prefect": {"PREFECT_API_AUTH_STRING": f"{USER}:{_PLACE}", "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{_PLACE}"},
}
"""By which its own clients and its server know a part's password."""


def password_path(home: Path, part: str) -> Path:
    return home / f"{part}-password"


def make_passwords(home: Path, parts: Collection[str]) -> None:
    """Those that are not there yet."""
    for part in parts:
        if not password_path(home, part).exists():
            write_whole(password_path(home, part), secrets.token_urlsafe(24) + "\n", mode=0o600)


def read_password(home: Path, part: str) -> str:
    return password_path(home, part).read_text().strip()


def password_environment(home: Path, parts: Collection[str]) -> dict[str, str]:
    """What every process of the stack, and each command, has in its environment."""
    return {name: text.format(read_password(home, part)) for part in parts for name, text in _VARIABLES[part].items()}


def shell_lines(home: Path, parts: Collection[str]) -> list[str]:
    """The same for a shell's file, which holds no password."""
    return [
        f'export {name}="{text.format(f"$(cat {shlex.quote(str(password_path(home, part)))})")}"'
        for part in parts
        for name, text in _VARIABLES[part].items()
    ]


def prefect_headers() -> dict[str, str]:
    """With which Prefect's server answers this process."""
    user = os.environ.get("PREFECT_API_AUTH_STRING")
    return {"Authorization": _basic(user)} if user else {}


def _basic(user: str) -> str:
    return "Basic " + base64.b64encode(user.encode()).decode()


class PasswordRequired:
    """An ASGI application that answers whoever gives the password, and everybody at `open_path` alone."""

    def __init__(self, app: ASGIApp, *, realm: str, user: str, open_path: str) -> None:
        """`user` as NAME:PASSWORD."""
        self._app = app
        self._realm = realm
        self._expected = _basic(user).encode()
        self._open_path = open_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or self._is_authorized(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            from starlette.responses import PlainTextResponse

            challenge = {"WWW-Authenticate": f'Basic realm="{self._realm}"'}
            await PlainTextResponse("Unauthorized\n", status_code=401, headers=challenge)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_open(self, scope: Scope) -> bool:
        return bool(scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == self._open_path)

    def _is_authorized(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)
