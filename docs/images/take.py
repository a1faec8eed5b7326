"""Takes the documentation's screenshots: `python docs/images/take.py [drill-report]`, all or only that one.

Needs Chromium, and the running local stack with one finished run (`unbroken up`, `unbroken run digits`): best a fresh
stack's first, for a repeated run takes its stages from the cache and has little to show; and one drill (`unbroken drill
digits`). The pages are single-page apps, so a picture is taken when what it is for is there and the page has stopped
changing.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from tasks import mlflow_client
from tasks.stack import open_stack
from training.errors import InfrastructureError, UnbrokenError, UserError

PRESET = "digits"
DRILL = "drill-report"
WIDTH, HEIGHT = 1440, 900
HEIGHTS = {DRILL: 1560}
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
CLASSIC = "?workflowType=machine_learning"  # MLflow's menu for training, with the registry; else it is that for GenAI


def pages() -> dict[str, tuple[str, str]]:
    """By picture, the pages of the preset's newest completed flow run: each URL, and what is true once it is ready."""
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
        "prefect-run": (f"{settings.prefect_ui_url}/runs/flow-run/{flow_runs[0].id}", GRAPH),
        "mlflow-metrics": (f"{run_url}/model-metrics{CLASSIC}", CHARTS),
        "mlflow-confusion": (f"{run_url}/artifacts/figures/confusion.png{CLASSIC}", FIGURE),
        "mlflow-registry": (f"{settings.mlflow_uri}/#/models/{PRESET}{CLASSIC}", ALIASES),
    }


def drill_report() -> dict[str, tuple[str, str]]:
    """The page of the preset's newest drill."""
    settings, _ = open_stack()
    reports = sorted((settings.home / "drills").glob(f"{PRESET}-*/report.html"))
    if not reports:
        raise UserError(f"there is no report of a drill: `unbroken drill {PRESET}` makes one")
    return {DRILL: (reports[-1].as_uri(), "document.readyState === 'complete'")}


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


def photograph(devtools: Connection, url: str, ready: str, *, height: int = HEIGHT) -> Image.Image:
    """The page in a new tab: once `ready`, a JavaScript expression, is true, no panel is open, and nothing moves."""
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
    call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=height, deviceScaleFactor=1, mobile=False)
    call("Page.navigate", url=url)
    before, still_since, deadline = b"", 0.0, time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        call("Runtime.evaluate", expression=CLOSE_PANELS)
        is_ready = call("Runtime.evaluate", expression=ready)["result"].get("value") is True
        picture = base64.b64decode(call("Page.captureScreenshot", format="png")["data"])
        if not is_ready or picture != before:
            before, still_since = picture, time.monotonic()
        elif time.monotonic() > still_since + STILL_SECONDS:
            return Image.open(io.BytesIO(picture)).convert("RGB")
        time.sleep(0.5)
    raise InfrastructureError(f"{url} was not ready and still within {TIMEOUT_SECONDS:.0f} s: {ready}")


def main() -> None:
    wanted = drill_report() if sys.argv[1:] == [DRILL] else {**pages(), **drill_report()}
    with browser() as devtools:
        for name, (url, ready) in wanted.items():
            path = Path(__file__).with_name(f"{name}.png")
            picture = photograph(devtools, url, ready, height=HEIGHTS.get(name, HEIGHT))
            picture.save(path, optimize=True)
            if path.stat().st_size > MAX_BYTES:
                picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path.name:20} {path.stat().st_size // 1000:3} KB  {url}")


if __name__ == "__main__":
    try:
        main()
    except UnbrokenError as error:
        sys.exit(f"take.py: {error}")
