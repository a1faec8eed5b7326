"""The front over HTTP: MLflow's scoring protocol, and what operators ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tasks.serving.follow import Follower
from tasks.serving.front import Front
from tasks.serving.metrics import Metrics
from training.documents import MAX_DIGITS
from training.errors import InfrastructureError

MAX_BODY_BYTES = 16 << 20
MAX_WAITING = 1000
MAX_WAITING_BYTES = 256 << 20
JSON = "application/json"
VERSION_HEADER = "x-unbroken-version"
CODES = {
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    499: "CLIENT_CLOSED_REQUEST",
    503: "TEMPORARILY_UNAVAILABLE",
}


class NotTakenError(Exception):
    """A request that no replica is asked."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class App:
    """`follower` is None where one version was asked for."""

    front: Front
    metrics: Metrics
    follower: Follower | None

    def routes(self, *, allowed_hosts: Sequence[str]) -> Starlette:
        """`allowed_hosts`: what a request's Host may be, as Starlette's TrustedHostMiddleware takes it."""
        return Starlette(
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts, www_redirect=False)],
            routes=[
                Route("/invocations", self.invocations, methods=["POST"]),
                Route("/ping", self.ping),
                Route("/health", self.ping),
                Route("/version", self.version),
                Route("/metrics", self.scrape),
            ],
        )

    async def invocations(self, request: Request) -> Response:
        began = time.perf_counter()
        try:
            response = await self._invoke(request)
        except NotTakenError as error:
            response = _refusal(error.status, str(error))
        except ClientDisconnect:
            response = _refusal(499, "the connection was closed before the body was whole")
        except InfrastructureError as error:
            response = _refusal(503, str(error))
        self.metrics.requests.labels(response.status_code).inc()
        self.metrics.seconds.observe(time.perf_counter() - began)
        return response

    async def _invoke(self, request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
            raise NotTakenError(415, f"Content-Type: expected {JSON}")
        body = await self._body(request)
        answer = await self.front.predict(body)
        head = answer.frame.head
        if head["status"] == 200:
            self.metrics.rows.inc(head["rows"])
            self.metrics.batch_rows.observe(head["batch_rows"])
        headers = {VERSION_HEADER: answer.version}
        return Response(answer.frame.body, head["status"], headers=headers, media_type=JSON)

    async def _body(self, request: Request) -> bytes:
        too_large = NotTakenError(413, f"the body is larger than {MAX_BODY_BYTES} bytes: send fewer rows at a time")
        told = request.headers.get("content-length", "")
        if told.isdecimal() and (len(told) > MAX_DIGITS or int(told) > MAX_BODY_BYTES):
            raise too_large
        pieces, num_bytes = [], 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > MAX_BODY_BYTES:
                raise too_large
            pieces.append(piece)
        if self.front.num_waiting >= MAX_WAITING or self.front.num_waiting_bytes + num_bytes > MAX_WAITING_BYTES:
            raise NotTakenError(503, f"{self.front.num_waiting} requests wait already: send this one again later")
        return b"".join(pieces)

    async def ping(self, request: Request) -> Response:
        """200 if a request would be answered now."""
        return Response("\n", 200 if self.front.num_ready else 503, media_type=JSON)

    async def version(self, request: Request) -> Response:
        return Response(orjson.dumps(self.told()), media_type=JSON)

    async def scrape(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def told(self) -> dict[str, Any]:
        """What is served, and what is wrong, if anything is."""
        kept = self.front.current.kept
        return {
            "model": kept.model,
            "version": kept.version,
            "run_key": kept.run_key,
            "model_sha256": kept.model_sha256,
            "follows": "champion" if self.follower is not None else None,
            "refused": (self.follower and self.follower.refused) or None,
            "store_trouble": (self.follower and self.follower.store_trouble) or None,
            "replicas": {"ready": self.front.num_ready, "pids": self.front.pids},
        }


def _refusal(status: int, message: str) -> Response:
    headers = {"retry-after": "1"} if status == 503 else None
    return Response(orjson.dumps({"error_code": CODES[status], "message": message}), status, headers, JSON)
