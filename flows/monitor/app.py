"""What the monitor answers over HTTP: /metrics to Prometheus, /alerts to Alertmanager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from infra.hosts import allowed_hosts
from infra.local.ports import LOOPBACK
from training.documents import read_json
from training.errors import DamagedError, UserError
from training.runs.exposition import CONTENT_TYPE, Page

MAX_BODY_BYTES = 1 << 20


class Board:
    """The newest page of each part, whoever looks at it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._pages: dict[str, str] = {}

    def put(self, part: str, page: Page) -> None:
        self._pages[part] = page.text()

    def text(self) -> str:
        disk, page = psutil.disk_usage(str(self._home)), Page()
        page.add("unbroken_stack_disk_bytes", disk.total, "Size of the disk under the stack's folder", {})
        page.add("unbroken_stack_disk_free_bytes", disk.free, "What is free there", {})
        return "".join([*self._pages.values(), page.text()])


def make_app(board: Board, take: Callable[[Any], None]) -> Starlette:
    """`take` is given what is posted at /alerts. Only loopback's own names are answered, and no web page's posts."""

    def metrics(request: Request) -> Response:
        return PlainTextResponse(board.text(), media_type=CONTENT_TYPE)

    async def alerts(request: Request) -> Response:
        try:
            await run_in_threadpool(take, await _posted(request))
        except UserError as error:
            return PlainTextResponse(f"{error}\n", 400)
        except OSError as error:  # Prefect is away: Alertmanager sends it again
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("")

    return Starlette(
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(LOOPBACK), www_redirect=False)],
        routes=[Route("/metrics", metrics), Route("/alerts", alerts, methods=["POST"])],
    )


async def _posted(request: Request) -> Any:
    """Raises `UserError` for what Alertmanager would not send."""
    if "origin" in request.headers:
        raise UserError("POST /alerts is for Alertmanager, not for a web page")
    refused = UserError(f"POST /alerts takes 1 to {MAX_BODY_BYTES} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BODY_BYTES:
        raise refused
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise refused
    if not body:
        raise refused
    try:
        return read_json(body, what="the message")
    except DamagedError as error:
        raise UserError(str(error)) from error
