"""Prometheus and Alertmanager, a monitor and a webhook around one run on a cluster, with windows of seconds."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flows.monitor.alerts import prefect_events
from flows.monitor.app import make_app
from flows.monitor.board import Board
from flows.monitor.runs import Runs, write_targets
from flows.monitor.servers import PrefectServer, ServersLook
from infra.launcher import JobState, JobStatus
from infra.local.ports import LOOPBACK
from infra.monitoring.render import read_windows, write_configs
from infra.settings import Settings
from tests.faults.agents import Agents
from tests.faults.hosts import Cluster
from tests.faults.relay import Relay
from tests.waiting import wait_until
from training.s3.objectstore import Store

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
PROMETHEUS = shutil.which("prometheus")
SERVERS = ("s3", "mlflow", "prefect")
LOOK_SECONDS = 0.5
SHORT: Mapping[str, Any] = {
    "look": "1s",
    "rate": "5s",
    "node_lost": "5s",
    "nodes_missing": "30s",
    "stalled": 20,
    "straggler": "8s",
    "throughput": "24s",
    "history": "5m",
    "checkpoint_old": 15,
    "service_away": "12s",
    "deadline": "5s",
    "repeated_over": "60s",
    "serving_over": "15s",
    "linger": "8s",
    "linger_worst": "30s",
    "group_wait": "3s",
    "group_interval": "2s",
}
"""Instead of minutes. In the same order: what is worse is noticed sooner than what follows from it."""


@dataclass
class Engine:
    """As an engine that has one job, which a flow run asked for."""

    key: str
    flow_run: str = field(default_factory=lambda: str(uuid.uuid4()))

    def jobs(self) -> Mapping[str, Sequence[str]]:
        return {self.key: [self.flow_run]}

    def find(self, key: str) -> JobStatus:
        return JobStatus(state=JobState.RUNNING, nodes={})


@dataclass(frozen=True)
class Message:
    """What the webhook was sent, and when (monotonic, in seconds)."""

    at: float
    document: Any

    @property
    def status(self) -> str:
        return str(self.document["status"])

    def alerts(self, *, since: float) -> list[dict[str, Any]]:
        """Those that began since then (seconds since 1970): what is over is sent again for a while beside them."""
        return [
            alert for alert in self.document["alerts"] if datetime.fromisoformat(alert["startsAt"]).timestamp() >= since
        ]

    def told(self, *, since: float = 0.0) -> str:
        return f"{self.status}: {' '.join(alert['labels']['alertname'] for alert in self.alerts(since=since))}"


class Door:
    """An HTTP server in the router's network, which can be closed, and opened again."""

    def __init__(self, cluster: Cluster, app: Starlette) -> None:
        self._namespace = cluster.router.namespace
        self._app = app
        self.port = 0
        self.open()

    def open(self) -> None:
        listener = self._namespace.inside(lambda: socket.create_server((LOOPBACK, self.port), backlog=128))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self._app, lifespan="off", log_config=None, timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, args=(self._server, listener), name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=120)

    def _serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._namespace.enter_network()  # for what the handlers ask of others
        server.run(sockets=[listener])


def webhook(messages: list[Message]) -> Starlette:
    async def take(request: Request) -> Response:
        messages.append(Message(time.monotonic(), await request.json()))
        return Response()

    return Starlette(routes=[Route("/alerts", take, methods=["POST"])])


@dataclass
class Site:
    """What was told, and how to ask Prometheus."""

    url: str
    """Prometheus's, as this process reaches it."""
    services: Mapping[str, Relay]
    """Which the monitor sees the servers through."""
    flow_run: str
    home: Path
    """Whose disk the monitor takes for that of the stack."""
    monitor: Door
    prometheus: Program
    messages: list[Message] = field(default_factory=list)

    def query(self, expression: str) -> list[dict[str, Any]]:
        request = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(request, timeout=10) as reply:
            found: list[dict[str, Any]] = json.loads(reply.read())["data"]["result"]
        return found

    def wait_for(self, expression: str, *, timeout_seconds: float = 90.0) -> list[dict[str, Any]]:
        what = f"Prometheus to find {expression}"
        return wait_until(lambda: self.query(expression), what=what, timeout_seconds=timeout_seconds)

    def fired(self, seconds: float) -> list[str]:
        """The names of all alerts that fired within so many seconds, told of or not."""
        found = self.query(f'max_over_time(ALERTS{{alertstate="firing"}}[{max(1, round(seconds))}s])')
        return sorted({each["metric"]["alertname"] for each in found})

    def wait_until_calm(self, *, timeout_seconds: float = 120.0) -> None:
        """For as long as Alertmanager might still wait before it tells of something."""

        def look() -> bool:
            return self.fired(4) == [] and self.query('ALERTS{alertstate="pending"}') == []

        wait_until(look, what="all alerts to be over", timeout_seconds=timeout_seconds)

    def forget(self) -> None:
        """What is over. For a quarter of an hour Prometheus tells Alertmanager of it again, which then repeats what it
        has said of what goes on: a message for another fault's sake."""
        self.prometheus.restart()
        again = time.time()
        wait_until(lambda: _is_ready(self.url), what="Prometheus to be ready again")
        self.wait_for(f'timestamp(up{{job="unbroken_monitor"}}) > {again}')

    def wait_for_message(self, number: int, *, timeout_seconds: float = 240.0) -> Message:
        """The message of that number, from 0."""
        what = f"message {number} to the webhook"
        wait_until(lambda: len(self.messages) > number, what=what, timeout_seconds=timeout_seconds)
        return self.messages[number]


@contextmanager
def site(
    agents: Agents, cluster: Cluster, settings: Settings, folder: Path, *, home: Path, serving: str = "", **windows: Any
) -> Iterator[Site]:
    """All of it is in the router's network, whence every host and, through relays, every server is reached.

    The disk of `home` passes for the stack's; `serving` is the URL of what serves a model.
    """
    with ExitStack() as stack:
        relays, seen = _relays(stack, cluster, settings)
        folder.mkdir()
        messages: list[Message] = []
        hook = Door(cluster, webhook(messages))
        stack.callback(hook.close)
        engine = Engine(agents.run.run_key)
        store = Store(replace(agents.run.store.location, endpoint=seen.s3_endpoint))
        runs = Runs(seen, store, cast(Any, engine))
        board = Board(replace(seen, home=home), store.location, runs)
        servers = ServersLook(seen, maybe_alertmanager=None)

        def take(message: Any) -> None:
            PrefectServer(seen.prefect_api_url).post("events", prefect_events(message, runs.flow_runs))

        def look_at_runs() -> None:
            runs.look()
            write_targets(folder / "nodes.json", runs.targets())

        def look_at_all_servers() -> None:
            board.servers = servers.look()

        monitor = Door(cluster, make_app(board, take))
        stack.callback(monitor.close)
        ports = {"monitor": monitor.port, "prometheus": 9090, "alertmanager": 9093}
        (folder / "windows.toml").write_text(_toml({**read_windows(), **windows}))
        told_at = {"windows": str(folder / "windows.toml"), "webhook": f"http://{LOOPBACK}:{hook.port}/alerts"}
        models = [_relay(stack, cluster.router.namespace.listen(LOOPBACK), serving)] if serving else []
        write_configs(folder, ports, {**told_at, "serving": [f"{LOOPBACK}:{relay.port}" for relay in models]})

        write_targets(folder / "nodes.json", [])
        _repeat(stack, cluster, look_at_runs)
        _repeat(stack, cluster, look_at_all_servers)
        prometheus, url = _start_programs(stack, cluster, folder, ports)
        yield Site(
            url=url,
            services=relays,
            flow_run=engine.flow_run,
            home=home,
            monitor=monitor,
            prometheus=prometheus,
            messages=messages,
        )


def _relays(stack: ExitStack, cluster: Cluster, settings: Settings) -> tuple[dict[str, Relay], Settings]:
    """By server, and the settings with which the monitor goes through them."""
    assert settings.maybe_mlflow_uri is not None
    relays = {"s3": cluster.store}
    for name, url in (("mlflow", settings.maybe_mlflow_uri), ("prefect", settings.prefect_api_url)):
        relays[name] = _relay(stack, cluster.router.namespace.listen(cluster.router.address), url)
    at = {name: f"http://{cluster.router.address}:{relay.port}" for name, relay in relays.items()}
    seen = replace(
        settings,
        s3_endpoint=at["s3"],
        maybe_mlflow_uri=at["mlflow"],
        maybe_prefect_api_url=f"{at['prefect']}/api",
    )
    return relays, seen


def _relay(stack: ExitStack, listener: Any, url: str, **options: Any) -> Relay:
    where = urlsplit(url)
    assert where.hostname is not None
    assert where.port is not None
    relay = Relay(listener, upstream=(where.hostname, where.port), **options)
    stack.callback(relay.close)
    return relay


def _repeat(stack: ExitStack, cluster: Cluster, look: Callable[[], None]) -> None:
    """In a thread in the router's network."""
    is_over = threading.Event()

    def run() -> None:
        cluster.router.namespace.enter_network()
        while not is_over.wait(LOOK_SECONDS):
            look()

    thread = threading.Thread(target=run, name="look", daemon=True)
    thread.start()
    stack.callback(thread.join, 30)
    stack.callback(is_over.set)


class Program:
    """One that runs in the router's network, and says what it does in a file."""

    def __init__(self, cluster: Cluster, command: Sequence[str], log: Path) -> None:
        self._namespace = cluster.router.namespace
        self._command = command
        self._log = log
        self.start()

    def start(self) -> None:
        with self._log.open("a") as log:
            self._process = self._namespace.start(self._command, stdout=log, stderr=log)

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()


def _start_programs(stack: ExitStack, cluster: Cluster, folder: Path, ports: Mapping[str, int]) -> tuple[Program, str]:
    """Prometheus, and its URL as this process reaches it, once it is ready."""
    programs = {}
    for program, name, more in (
        (PROMETHEUS, "prometheus", [f"--storage.tsdb.path={folder / 'data'}"]),
        (ALERTMANAGER, "alertmanager", [f"--storage.path={folder / 'am'}", "--cluster.listen-address="]),
    ):
        listens = f"--web.listen-address={LOOPBACK}:{ports[name]}"
        command = [str(program), f"--config.file={folder / name}.yaml", listens, *more]
        programs[name] = Program(cluster, command, folder / f"{name}.log")
        stack.callback(programs[name].stop)
    enter_network = cluster.router.namespace.enter_network
    there = f"http://{LOOPBACK}:{ports['prometheus']}"
    relay = _relay(stack, socket.create_server((LOOPBACK, 0)), there, enter_network=enter_network)
    url = f"http://{LOOPBACK}:{relay.port}"
    wait_until(lambda: _is_ready(url), what="Prometheus to be ready")
    return programs["prometheus"], url


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
            return True
    except OSError:
        return False


def _toml(windows: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in windows.items())
