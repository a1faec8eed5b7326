"""The parsers of `infra` and `flows`: settings, what Slurm prints, what Prefect, Prometheus and Alertmanager send."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

from flows.monitor.agents import node_view
from flows.monitor.alerts import prefect_events
from flows.monitor.app import make_app
from flows.monitor.firing import alerts_in
from flows.monitor.page import runs_page, servers_page
from flows.monitor.seen import Seen
from flows.monitor.servers import PrefectServer, ask_prefect
from flows.monitor.view import Overview, RunView, Servers, to_json, view_of
from flows.publish import judged_of, wanted_of
from flows.reaper.flow_runs import newest_event
from infra import settings
from infra.monitoring.render import WINDOWS, read_windows
from infra.slurm.claims import Claim, read_claim
from infra.slurm.commands import Commands
from infra.slurm.node import place_of
from infra.slurm.offer import what_would_fit
from infra.slurm.requirements import judge, judge_partition, parse_config
from infra.slurm.tasks import job_name, parse_tasks
from tasks.bookmark import Bookmark
from tasks.follow import Follower
from tasks.prediction.wanted import Wanted
from tests.fuzz.of_data import FolderOf
from tests.fuzz.of_network import LOOP
from tests.fuzz.of_presets import TOML_WORDS
from tests.fuzz.of_training import EVENT_LINES, JOB, RECORD_DOCUMENT, document
from tests.fuzz.parser import DIGEST, Held, MemoryFile, Parser
from tests.unit.status_views import VIEW
from training.cluster.links import Place
from training.documents import canonical_json, read_json
from training.errors import MissingError
from training.runs.record import RunRecord

NAME = job_name("m", DIGEST).encode()
CLAIM = canonical_json(asdict(Claim(job_id="7", owners=("a",))))
QUEUE = b"\n".join(
    (
        b"7|0|" + NAME + b"|PENDING|Resources|",
        b"7|1|" + NAME + b"|RUNNING|None|n1",
        b"8|N/A|other|RUNNING|None|n2",
    )
)
CONFIG = b"""Configuration data as of 2026-11-27T08:00:00
AuthInfo                = cred_expire=5
SlurmdTimeout           = 30 sec
ReturnToService         = 2
PreemptType             = preempt/qos
PreemptMode             = REQUEUE
SLURM_VERSION           = 24.05.1
SlurmdParameters        =
"""
PARTITION = b"PartitionName=spare AllowGroups=ALL GraceTime=30 PreemptMode=REQUEUE State=UP Nodes=n[1-4]"
NODE = b"NodeName=n1 Arch=x86_64 CPUTot=4 NodeAddr=127.0.0.1 NodeHostName=n1 State=IDLE"
OFFER = b"spare|up|4|2|1000|(null)|1:00:00\ngpu|up|2|8|64000|gpu:2(S:0)|infinite"
SLURM_WORDS = (
    *(b"|", b"=", b" = ", b"\n", b"(null)", b"N/A", b"GraceTime=", b"GraceTime=UNLIMITED", b"GraceTime=-1"),
    *(b"PartitionName=", b"PreemptMode=OFF", b"cred_expire=", b"\xd9\xa1", b"slurm_load_jobs error"),
    *(b"NodeAddr=", b"NodeAddr=(null)", b"NodeAddr=a..b", b"NodeAddr=" + b"a" * 70, b"9" * 5000, b"\x0c"),
    *(b"\xc2\x85",),
)
SETTINGS = b"""[s3]
endpoint = "http://127.0.0.1:1"
bucket = "b"
prefix = "p"
[mlflow]
uri = "http://127.0.0.1:2"
gate = "gate.toml"
[prefect]
api_url = "http://127.0.0.1:3/api"
[ports]
mlflow = 5000
[watch]
presets = ["digits"]
[engine]
kind = "slurm"
[monitoring]
serving = ["127.0.0.1:8000"]
webhook = "https://127.0.0.1/x"
[slurm]
partition = "gpu"
priorities = {high = "partition=a", low = "qos=b"}
"""
STATE = json.dumps(
    {"s3": {"endpoint": "http://127.0.0.1:1"}, "mlflow": {"uri": "u"}, "prefect": {"api_url": "p"}}
).encode()
ALERTS = json.dumps(
    {
        "alerts": [
            {
                "status": status,
                "labels": labels,
                "annotations": {"summary": "it stands"},
                "startsAt": "2026-01-01T00:00:00Z",
                "endsAt": "0001-01-01T00:00:00Z",
            }
            for status, labels in (
                ("firing", {"alertname": "Stalled", "run": "0123456789ab"}),
                ("resolved", {"alertname": "ServiceAway", "service": "s3"}),
            )
        ]
    }
).encode()
FLOW_RUNS = json.dumps(
    {
        "history": [{"interval_start": "2000-01-01T00:00:00Z", "states": [{"state_type": "RUNNING", "count_runs": 3}]}],
        "waiting": [
            {
                "next_scheduled_start_time": due,
                "expected_start_time": "2026-01-01T00:00:00Z",
                "work_queue_name": queue,
                "name": "a",
                "state_name": "Late",
                "id": "0190",
            }
            for due, queue in ((None, "default"), ("2026-01-01T00:00:00+00:00", None))
        ],
    }
).encode()
FIRING = json.dumps(
    [{"labels": {"alertname": "Stalled", "run": "a"}, "annotations": {"summary": "s"}, "startsAt": "2026"}]
).encode()
SHOWN = json.dumps(to_json(VIEW)).encode()
PLACE = Place(node=0, incarnation="i", address="10.0.0.1", port=1)
HEARTBEATS = b'{"events": [{"id": "0190", "event": "prefect.flow-run.heartbeat"}], "total": 1}'
WANTED = canonical_json(asdict(Wanted(model="m", version="3", dataset="d", dataset_digest=DIGEST)))
GET = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
HTTP_WORDS = (
    *(b"POST /alerts HTTP/1.1\r\n", b"GET /metrics HTTP/1.0\r\n", b"GET / HTTP/9.9\r\n"),
    *(b"HEAD /metrics HTTP/1.1\r\n", b"Content-Length: x\r\n", b"Content-Length: -5\r\n"),
    *(b"Content-Length: 99999999999\r\n", b"PUT", b"Content-Length: \xb2\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Expect: 100-continue\r\n", b"\r\n\r\n", b"A: " + b"b" * 70_000 + b"\r\n", b"a:b\r\n" * 120),
    *(b"POST /alerts/", b"GET /runs/a.json ", b"Origin: http://a\r\n", b"Host: a\r\n", b"GET /style.css "),
)
FILE = MemoryFile()


AGENT = b"".join(
    b'unbroken_%s{run="a",node="0"%s} %s\n' % line
    for line in (
        (b"rank_step", b',rank="0"', b"5"),
        (b"rank_loss", b',rank="0"', b"0.5"),
        (b"rank_steps_total", b',rank="0"', b"5"),
        (b"rank_pace_seconds_total", b',rank="0"', b"0.5"),
        (b"node_training", b"", b"1"),
        (b"node_peers", b"", b"1"),
        (b"machine_memory_bytes", b"", b"100"),
        (b"machine_disk_free_bytes", b',disk="/"', b"1e9"),
    )
)
PAGE_WORDS = (
    *(b'{run="', b'"} ', b"# TYPE unbroken_run_step gauge\n", b"NaN", b"+Inf", b"1e999", b"\\"),
    *(b'unbroken_run_info{run="a"} 1\n', b"unbroken_run_step", b"} 1 1 1", b'{a="b",}', b"#", b"\n", b"# EOF\n"),
    *(b'unbroken_run_active{run="b"} NaN\n',),
)


def parsers() -> list[Parser]:
    return [
        Parser(name="what Slurm has queued", seeds=(QUEUE,), parse=queued, words=SLURM_WORDS),
        Parser(name="Slurm's settings", seeds=(CONFIG,), parse=configured, words=SLURM_WORDS, refuses=False),
        Parser(name="a partition of Slurm's", seeds=(PARTITION,), parse=a_partition, words=SLURM_WORDS, refuses=False),
        Parser(name="a node of Slurm's", seeds=(NODE,), parse=a_node, words=SLURM_WORDS),
        Parser(name="what Slurm has", seeds=(OFFER,), parse=offered, words=SLURM_WORDS, refuses=False),
        Parser(name="a claim on a run", seeds=(CLAIM,), parse=a_claim),
        Parser(name="the settings file", seeds=(SETTINGS,), parse=settings_of, words=TOML_WORDS),
        Parser(name="what a local stack notes", seeds=(STATE,), parse=noted),
        Parser(name="the windows of alerts", seeds=(WINDOWS.read_bytes(),), parse=windows, words=TOML_WORDS),
        Parser(name="events, as they are watched", seeds=(EVENT_LINES,), parse=seen),
        Parser(name="an agent's metrics", seeds=(AGENT,), parse=agents_view, words=PAGE_WORDS),
        Parser(name="Alertmanager's alerts", seeds=(FIRING,), parse=alerts_in),
        Parser(name="what the monitor says of a run", seeds=(SHOWN,), parse=lambda data: document(RunView, data)),
        Parser(name="a message of Alertmanager", seeds=(ALERTS,), wrap=posted, parse=answered, refuses=False),
        Parser(name="an HTTP request to the monitor", seeds=(posted(ALERTS), GET),
               parse=answered, words=HTTP_WORDS, refuses=False),
        Parser(name="Prefect's flow runs", seeds=(FLOW_RUNS,), parse=flow_runs, refuses=False),
        Parser(name="a label of a flow run", seeds=(b"3 12", WANTED), parse=label, words=(b" ", b"9" * 5000)),
        Parser(name="Prefect's heartbeats", seeds=(HEARTBEATS,), parse=newest_event),
    ]  # fmt: skip


def text(data: bytes) -> str:
    """What a command prints, which is read as this machine's locale has it."""
    return data.decode(errors="surrogateescape")


def printing(said: bytes) -> Commands:
    """Slurm's commands, all of which print this."""
    return cast(Commands, SimpleNamespace(run=lambda *arguments: text(said)))


def queued(data: bytes) -> Any:
    return [task.describe() for task in parse_tasks(text(data), mark="m")]


def configured(data: bytes) -> Any:
    return judge(parse_config(text(data)), has_priorities=True)


def a_partition(data: bytes) -> Any:
    return judge_partition(text(data))


def a_node(data: bytes) -> Any:
    with patch.object(socket, "gethostbyname", numeric):
        return place_of(printing(data), "n1")


def numeric(name: str) -> str:
    """Asks nobody on the network."""
    name.encode("idna")
    if name != "127.0.0.1":
        raise socket.gaierror(-2, "Name or service not known")
    return name


def offered(data: bytes) -> Any:
    return what_would_fit(printing(data))


def a_claim(data: bytes) -> Any:
    return read_claim(Held({".json": data}), DIGEST)


@contextmanager
def home(data: bytes) -> Iterator[None]:
    with patch.dict(os.environ, {"UNBROKEN_SETTINGS": str(FILE.holding(data)), "UNBROKEN_HOME": "/nonexistent"}):
        yield


def settings_of(data: bytes) -> Any:
    asked = (settings.load_settings, settings.watched_presets, settings.monitoring_settings)[len(data) % 3]
    with home(data):
        return asked()


def noted(data: bytes) -> Any:
    return settings.read_state(FolderOf(data))  # type: ignore[arg-type]  # of a folder, what is used


def windows(data: bytes) -> Any:
    return read_windows(FILE.holding(data))


def seen(data: bytes) -> Any:
    """By a monitor, which tells Prometheus and people of it."""
    run = RunRecord(Held({"record.json": canonical_json(RECORD_DOCUMENT), "000003/000000.jsonl": data}), DIGEST)
    found = Seen(Follower(run, generation=0, num_steps=20, bookmark=Bookmark(position=(3, 0))))
    view = view_of(
        record=found.look(),
        preset=JOB.preset,
        seen=found,
        maybe_job=None,
        is_at_work=True,
        links={},
        now=5.0,
    )
    return runs_page([view]).text().encode(), json.dumps(to_json(view), allow_nan=False)


def agents_view(data: bytes) -> Any:
    return json.dumps(to_json(node_view(PLACE, data.decode(errors="replace"))), allow_nan=False)


def posted(body: bytes) -> bytes:
    return b"POST /alerts HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def take(message: Any) -> None:
    json.dumps(prefect_events(message, lambda run: [f"flow run of {run}"]))


class Shown:
    """What was seen last."""

    def metrics(self) -> str:
        return "metrics"

    def overview(self) -> Overview:
        return Overview(at=0.0, runs=(VIEW,), servers=Servers(at=0.0), disk_bytes=2, disk_free_bytes=1, links={})

    def run(self, key: str) -> RunView:
        if key != VIEW.key:
            raise MissingError(f"no run {key!r}")
        return VIEW


APP = make_app(cast(Any, Shown()), take)


def answered(data: bytes) -> int:
    """By the monitor, to whoever reaches its port: what the server in front makes of a head and a body."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    method, _, path = first.partition(b" ")
    pairs = [line.partition(b":")[::2] for line in lines]
    scope = {
        "type": "http",
        "method": method.decode("latin-1"),
        "path": path.partition(b" ")[0].decode("latin-1"),
        "query_string": b"",
        "headers": [(name.lower(), value.strip()) for name, value in pairs],
    }
    sent, left = list[Any](), [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if not left:
            await asyncio.Event().wait()  # until the caller hangs up, which this one does not
        return left.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    LOOP.run_until_complete(APP(scope, receive, send))
    return int(sent[0]["status"])


def label(data: bytes) -> Any:
    said = data.decode(errors="replace")
    return wanted_of(said) if said.startswith("{") else judged_of(said)


def flow_runs(data: bytes) -> Any:
    """To a monitor that asks for counts and for those that wait."""
    prefect = PrefectServer("http://127.0.0.1:1/api")

    def post(path: str, body: Any) -> Any:
        found = read_json(data, what="Prefect's answer")
        return found["history" if path.endswith("history") else "waiting"]

    with patch.object(prefect, "post", post):
        counts, waiting = ask_prefect(prefect)
    return servers_page(Servers(at=0.0, flow_runs=counts, waiting=waiting)).text().encode()
