"""What the monitor answers over HTTP: pages and JSON for people, /metrics for Prometheus, /alerts for Alertmanager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from flows.monitor.board import Board
from flows.monitor.rendering import error_html, overview_html, run_html
from flows.monitor.view import to_json
from infra.hosts import allowed_hosts
from infra.local.ports import LOOPBACK
from training.documents import MAX_DIGITS, read_json
from training.errors import DamagedError, MissingError, UnbrokenError, UserError
from training.runs.exposition import CONTENT_TYPE

MAX_BODY_BYTES = 1 << 20
STYLE = Path(__file__).with_name("pages") / "style.css"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(board: Board, take: Callable[[Any], None]) -> Starlette:
    """`take` is given what is posted at /alerts. Only loopback's own names are answered, and no web page's posts."""

    def metrics(request: Request) -> Response:
        return PlainTextResponse(board.metrics(), media_type=CONTENT_TYPE)

    def overview(request: Request) -> Response:
        return HTMLResponse(overview_html(board.overview()), headers=HEADERS)

    def overview_json(request: Request) -> Response:
        return JSONResponse(to_json(board.overview()), headers=HEADERS)

    def run(request: Request) -> Response:
        try:
            return HTMLResponse(run_html(board.run(request.path_params["key"])), headers=HEADERS)
        except UnbrokenError as error:
            return HTMLResponse(error_html(str(error)), _status(error), headers=HEADERS)

    def run_json(request: Request) -> Response:
        try:
            return JSONResponse(to_json(board.run(request.path_params["key"])), headers=HEADERS)
        except UnbrokenError as error:
            return JSONResponse({"error": str(error)}, _status(error), headers=HEADERS)

    def style(request: Request) -> Response:
        return FileResponse(STYLE, media_type="text/css", headers={"X-Content-Type-Options": "nosniff"})

    async def alerts(request: Request) -> Response:
        try:
            await run_in_threadpool(take, await _posted(request))
        except UserError as error:
            return PlainTextResponse(f"{error}\n", 400)
        except (OSError, UnbrokenError) as error:  # Prefect is away: Alertmanager sends it again
            return PlainTextResponse(f"{error}\n", 503)
        return PlainTextResponse("")

    return Starlette(
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(LOOPBACK), www_redirect=False)],
        routes=[
            Route("/", overview),
            Route("/overview.json", overview_json),
            Route("/runs/{key}.json", run_json),
            Route("/runs/{key}", run),
            Route("/style.css", style),
            Route("/metrics", metrics),
            Route("/alerts", alerts, methods=["POST"]),
        ],
    )


def _status(error: UnbrokenError) -> int:
    return 404 if isinstance(error, MissingError | UserError) else 503


async def _posted(request: Request) -> Any:
    """Raises `UserError` for what Alertmanager would not send."""
    if "origin" in request.headers:
        raise UserError("POST /alerts is for Alertmanager, not for a web page")
    refused = UserError(f"POST /alerts takes 1 to {MAX_BODY_BYTES} bytes")
    told = request.headers.get("content-length", "")
    if told.isdecimal() and (len(told) > MAX_DIGITS or int(told) > MAX_BODY_BYTES):
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
