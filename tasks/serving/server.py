"""`unbroken serve`, from its arguments to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from infra.hosts import allowed_hosts
from tasks.serving import offer, published
from tasks.serving.app import App
from tasks.serving.follow import Follower
from tasks.serving.front import Front
from tasks.serving.metrics import Metrics
from tasks.serving.offer import Offer
from tasks.serving.published import SeenChampion
from training.errors import InfrastructureError, UserError
from training.s3.objectstore import Store

DRAIN_SECONDS = 30
BACKLOG = 1024


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A model's champion, whoever that is; or one version of it."""

    model: str
    maybe_version: str | None

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Raises `UserError` for what is neither NAME@champion nor NAME/VERSION."""
        model, at, alias = text.partition("@")
        if model and at and alias == "champion":
            return cls(model=model, maybe_version=None)
        model, slash, version = text.rpartition("/")
        if model and slash and version and not at:
            return cls(model=model, maybe_version=version)
        raise UserError(f"{text!r} is no model that can be served: give NAME@champion, or NAME/VERSION")


def serve(
    store: Store,
    text: str,
    *,
    host: str,
    port: int,
    num_replicas: int,
    poll_seconds: float,
    tell: Callable[[dict[str, Any]], None],
) -> None:
    """Until SIGTERM or Ctrl-C; then what was asked is answered. `tell` is called once it serves.

    Raises `UserError` (no such model, no champion, no model file, the port is taken), `DamagedError` and
    `InfrastructureError`.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(message)s")
    wanted = Wanted.parse(text)
    if num_replicas < 1:
        raise UserError(f"--replicas {num_replicas}: one is the least")
    if poll_seconds <= 0:
        raise UserError(f"--poll-seconds {poll_seconds:g}: must be above 0")
    with listening(host, port) as listener:
        maybe_champion = published.find_champion(store, wanted.model) if wanted.maybe_version is None else None
        if maybe_champion is None:
            kept = published.find_version(store, wanted.model, str(wanted.maybe_version))
        else:
            kept = published.of_champion(store, wanted.model, maybe_champion)
        first = offer.fetch(store, kept)
        asyncio.run(_Serving(store, listener, num_replicas, poll_seconds, tell).run(first, maybe_champion))


class _Serving:
    def __init__(
        self,
        store: Store,
        listener: socket.socket,
        num_replicas: int,
        poll_seconds: float,
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._listener = listener
        self._num_replicas = num_replicas
        self._poll_seconds = poll_seconds
        self._tell = tell

    async def run(self, first: Offer, maybe_champion: SeenChampion | None) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        metrics = Metrics()
        front = Front(num_replicas=self._num_replicas, metrics=metrics)
        asked_to_stop = asyncio.create_task(stopping.wait())
        starting = asyncio.create_task(front.start(first))
        try:
            await asyncio.wait({starting, asked_to_stop}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                return
            await starting
            app = App(front=front, metrics=metrics, follower=self._follower(front, metrics, first, maybe_champion))
            await self._serve(app, asked_to_stop)
        finally:
            await front.close()

    def _follower(
        self, front: Front, metrics: Metrics, first: Offer, maybe_champion: SeenChampion | None
    ) -> Follower | None:
        if maybe_champion is None:
            return None
        loop = asyncio.get_running_loop()
        follower = Follower(
            self._store,
            first.kept.model,
            champion=maybe_champion,
            served=first.identity,
            switch=lambda offer: asyncio.run_coroutine_threadsafe(front.switch(offer), loop).result(),
            metrics=metrics,
        )
        follower.start(every_seconds=self._poll_seconds)
        return follower

    async def _serve(self, app: App, asked_to_stop: asyncio.Task[Any]) -> None:
        server = _Server(
            uvicorn.Config(
                app.routes(allowed_hosts=allowed_hosts(str(self._listener.getsockname()[0]))),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                timeout_keep_alive=75,
                backlog=BACKLOG,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        address, port = self._listener.getsockname()[:2]
        name = f"[{address}]" if ":" in address else address
        self._tell({"url": f"http://{name}:{port}", **app.told()})
        await asyncio.wait({serving, asked_to_stop}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: replicas must outlive the last answer, so signals are handled where both are known."""
        yield


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Whoever connects before there is a replica waits."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise UserError(f"--host {host!r}: {error.strerror}") from error
    except OverflowError as error:
        raise UserError(f"--port {port}: must be 0 (any free one) to 65535") from error
    except OSError as error:
        raise InfrastructureError(
            f"cannot listen on {host} port {port}: {error.strerror}: give another --port"
        ) from error
    with listener:
        listener.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # all its connections inherit it; else 40 ms each
        yield listener
