"""Takes the documentation's screenshots: `python docs/images/take.py [drill-report | run-report | status]`, or all.

Needs Chromium, and the running local stack with one finished run (`unbroken up`, `unbroken run digits`): best a fresh
stack's first, for a repeated run takes its stages from the cache and has little to show; and one drill (`unbroken drill
digits`). `run-report` tells of the run that most nodes left; `status` wants a run at work instead, best one that was
disturbed. Most pages are single-page apps, so a picture is taken when what it is for is there and the page has stopped
changing.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from infra.local.stack import monitor_url
from tasks import mlflow_client
from tasks.report.gather import gather
from tasks.report.page import page_of
from tasks.stack import open_stack
from training.errors import InfrastructureError, UnbrokenError, UserError
from training.runs.record import RunRecord

PRESET = "digits"
UNBROKEN = (sys.executable, "-c", "from flows.cli import main; main()")
DRILL, REPORT, STATUS = "drill-report", "run-report", "status"
WIDTH, HEIGHT = 1440, 900
PHONE_WIDTH = 390
TERMINAL_COLUMNS, TERMINAL_LINES = 84, 60
MAX_BYTES = 200_000
TIMEOUT_SECONDS = 60.0
STILL_SECONDS = 3.0  # a spinner never holds still, so this waits for its end too
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
    # A mouse that can hover: without one, the charts show their tool bars all the time.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
# JavaScript: the task graph's data is there; the curves are drawn; the figure is loaded; the aliases are listed.
GRAPH = "performance.getEntriesByType('resource').some(entry => entry.name.endsWith('/graph-v2'))"
CHARTS = "document.querySelectorAll('.js-line').length > 3"
FIGURE = "[...document.images].some(i => i.alt.endsWith('confusion.png') && i.complete && i.naturalWidth > 0)"
ALIASES = "document.body.innerText.includes('champion')"
CLOSE_PANELS = "document.querySelectorAll('button[aria-label=\"Close\" i]').forEach(button => button.click())"
LOADED = "document.readyState === 'complete'"
CLASSIC = "?workflowType=machine_learning"  # MLflow's menu for training, with the registry; else it is that for GenAI


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A page, and how it is looked at."""

    url: str
    ready: str = LOADED
    """JavaScript that is true once what the picture is for is there."""
    width: int = WIDTH
    height: int = HEIGHT
    """0: the whole page's."""
    scale: int = 1
    is_dark: bool = False
    moves: bool = False
    """Whether it never holds still."""


def pages() -> dict[str, Shot]:
    """By picture, the pages of the preset's newest completed flow run."""
    settings, _ = open_stack()
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, FlowFilter, FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort

    from flows.publish import RUN_KEY_LABEL

    with get_client(sync_client=True) as prefect:
        flow_runs = prefect.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": ["pipeline"]}}),
            deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [PRESET]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": ["COMPLETED"]}}}),
            sort=FlowRunSort.END_TIME_DESC,
        )
    if not flow_runs:
        raise UserError(f"there is no finished run: `unbroken run {PRESET}` makes one")
    mlflow = mlflow_client.connect(settings.mlflow_uri)
    by_key = f"name = '{PRESET}' and tags.`{mlflow_client.RUN_KEY_TAG}` = '{flow_runs[0].labels[RUN_KEY_LABEL]}'"
    run = mlflow.get_run(str(mlflow.search_model_versions(by_key)[0].run_id)).info
    run_url = f"{settings.mlflow_uri}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    return {
        "prefect-run": Shot(url=f"{settings.prefect_ui_url}/runs/flow-run/{flow_runs[0].id}", ready=GRAPH),
        "mlflow-metrics": Shot(url=f"{run_url}/model-metrics{CLASSIC}", ready=CHARTS),
        "mlflow-confusion": Shot(url=f"{run_url}/artifacts/figures/confusion.png{CLASSIC}", ready=FIGURE),
        "mlflow-registry": Shot(url=f"{settings.mlflow_uri}/#/models/{PRESET}{CLASSIC}", ready=ALIASES),
    }


def drill_report() -> dict[str, Shot]:
    """The page of the preset's newest drill."""
    settings, _ = open_stack()
    reports = sorted((settings.home / "drills").glob(f"{PRESET}-*/report.html"))
    if not reports:
        raise UserError(f"there is no report of a drill: `unbroken drill {PRESET}` makes one")
    return {DRILL: Shot(url=reports[-1].as_uri(), height=1560)}


def status() -> dict[str, Shot]:
    """Of the newest run: its page on a desktop and, in the dark, on a phone; the stack's page; the terminal."""
    url = monitor_url()
    with urllib.request.urlopen(f"{url}/overview.json", timeout=TIMEOUT_SECONDS) as reply:
        runs = json.load(reply)["runs"]
    if not runs:
        raise UserError(f"no run is at work: `unbroken run {PRESET}` starts one")
    key = runs[0]["key"]
    screen = Path(tempfile.mkdtemp()) / "terminal.html"
    screen.write_text(as_page(on_terminal([*UNBROKEN, "status", key[:12]])), encoding="utf-8")
    return {
        "status-run": Shot(url=f"{url}/runs/{key}", width=1120, height=0, moves=True),
        "status-phone": Shot(url=f"{url}/runs/{key}", width=PHONE_WIDTH, height=844, scale=2, is_dark=True, moves=True),
        "status-stack": Shot(url=url, width=1120, height=0, moves=True),
        "status-terminal": Shot(url=screen.as_uri(), width=760, height=0),
    }


def on_terminal(command: Sequence[str]) -> str:
    """The first screen that a command shows on a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", TERMINAL_LINES, TERMINAL_COLUMNS, 0, 0))
    process = subprocess.Popen(command, stdout=theirs, env={**os.environ, "COLUMNS": "", "LINES": ""})
    os.close(theirs)
    text = b""
    with suppress(OSError):  # the command has ended
        while b"\x1b[J" not in text and (piece := os.read(ours, 1 << 16)):
            text += piece
    process.terminate()
    process.wait(TIMEOUT_SECONDS)
    os.close(ours)
    return re.split(r"\x1b\[\d+F", text.decode().replace("\r", ""))[0]


def as_page(text: str) -> str:
    """What a terminal shows, as HTML."""
    spans = re.sub(r"\x1b\[(\d+)m", r'<span class="c\1">', escape(text)).replace('<span class="c0">', "</span>")
    return (
        "<!doctype html><meta charset=utf-8><style>body{margin:0;background:#12161d;color:#d8dee9;padding:18px 22px}"
        "pre{font:14px/1.45 'DejaVu Sans Mono',monospace;margin:0}.c1{font-weight:700;color:#fff}.c2{color:#7d8797}"
        f".c31{{color:#ff7d74}}.c32{{color:#56c98d}}</style><pre>{spans}</pre>"
    )


def run_report() -> dict[str, Shot]:
    """The page of the finished run from which most nodes departed, made anew."""
    settings, store = open_stack()
    runs = [RunRecord(store, key) for key in store.list_folders("runs/")]
    finished = [run for run in runs if (record := run.find()) is not None and record.result is not None]
    if not finished:
        raise UserError(f"there is no finished run: `unbroken run {PRESET}` makes one")
    facts = gather(settings, max(finished, key=lambda run: len(run.read().departures)))
    path = settings.home / f"{REPORT}.html"
    path.write_text(page_of(facts), encoding="utf-8")
    return {REPORT: Shot(url=path.as_uri(), height=2020)}


@contextmanager
def browser() -> Iterator[Connection]:
    """The DevTools connection of a headless browser that has no past and leaves nothing behind."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise UserError("no browser on the PATH: install Chromium (Debian, Ubuntu: `apt-get install chromium`)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            address = Path(profile, "DevToolsActivePort")  # gets two lines: the port, the path
            while not address.is_file() or "/" not in address.read_text():
                if process.poll() is not None:
                    raise InfrastructureError(f"{program} does not start: it ended with code {process.returncode}")
                time.sleep(0.1)
            url = "ws://127.0.0.1:" + address.read_text().replace("\n", "")
            with connect(url, max_size=None, proxy=None) as devtools:
                yield devtools
                devtools.send(json.dumps({"id": 1, "method": "Browser.close"}))  # tidies up; terminate() does not
                process.wait(TIMEOUT_SECONDS)
        finally:
            process.terminate()


def photograph(devtools: Connection, shot: Shot) -> tuple[Image.Image, int]:
    """The page in a new tab, once it is ready, no panel is open, and nothing moves; and how wide its content is."""
    session: dict[str, str] = {}

    def call(method: str, **parameters: Any) -> Any:
        devtools.send(json.dumps({"id": 1, "method": method, "params": parameters, **session}))
        while "id" not in (reply := json.loads(devtools.recv(TIMEOUT_SECONDS))):
            pass  # an event; the answer has the id, always 1 because the calls never overlap
        if "error" in reply:
            raise InfrastructureError(f"the browser refused {method}: {reply['error']}")
        return reply["result"]

    target = call("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def evaluate(expression: str) -> Any:
        return call("Runtime.evaluate", expression=expression)["result"].get("value")

    def resize(height: int) -> None:
        call(
            "Emulation.setDeviceMetricsOverride",
            width=shot.width,
            height=height,
            deviceScaleFactor=shot.scale,
            mobile=shot.width == PHONE_WIDTH,
        )

    scheme = {"name": "prefers-color-scheme", "value": "dark" if shot.is_dark else "light"}
    call("Emulation.setEmulatedMedia", features=[scheme])
    resize(shot.height or HEIGHT)
    call("Page.navigate", url=shot.url)
    before, still_since, deadline = b"", 0.0, time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        evaluate(CLOSE_PANELS)
        is_ready = evaluate(shot.ready) is True
        if is_ready and not shot.height:
            resize(int(evaluate("document.body.offsetHeight")))
        picture = base64.b64decode(call("Page.captureScreenshot", format="png")["data"])
        if not is_ready or (picture != before and not shot.moves):
            before, still_since = picture, time.monotonic()
        elif shot.moves or time.monotonic() > still_since + STILL_SECONDS:
            return Image.open(io.BytesIO(picture)).convert("RGB"), int(evaluate("document.documentElement.scrollWidth"))
        time.sleep(0.5)
    raise InfrastructureError(f"{shot.url} was not ready and still within {TIMEOUT_SECONDS:.0f} s: {shot.ready}")


def main() -> None:
    sets = {DRILL: drill_report, REPORT: run_report, STATUS: status}
    makers = [sets[name] for name in sys.argv[1:]] or [pages, drill_report, run_report]
    wanted = {name: shot for make in makers for name, shot in make().items()}
    with browser() as devtools:
        for name, shot in wanted.items():
            path = Path(__file__).with_name(f"{name}.png")
            picture, _ = photograph(devtools, shot)
            picture.save(path, optimize=True)
            if path.stat().st_size > MAX_BYTES:
                picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path.name:20} {path.stat().st_size // 1000:3} KB  {shot.url}")


if __name__ == "__main__":
    try:
        main()
    except UnbrokenError as error:
        sys.exit(f"take.py: {error}")
