"""Takes the documentation's screenshots: `python docs/images/take.py`.

Needs the running local stack with a finished run (`unbroken up`, `unbroken run digits`), and Chromium. The pages are
single-page apps, so a picture is taken when what it must show is there and the page has stopped changing.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

from flows.publish import RUN_KEY_LABEL
from tasks import tracking
from tasks.stack import open_stack
from training.errors import InfrastructureError, UnbrokenError, UserError

FOLDER = Path(__file__).parent
PRESET = "digits"
WIDTH, HEIGHT = 1440, 900
MAX_BYTES = 200_000
TIMEOUT_SECONDS = 120.0
STILL_SECONDS = 3.0  # a spinner never holds still, so this waits for it too
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
    # A mouse that can hover: without one, the charts show their tool bars all the time.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
CLOSE_PANELS = "document.querySelectorAll('button[aria-label=\"Close\" i]').forEach(button => button.click())"
CLASSIC = "workflowType=machine_learning"  # MLflow's menu for training, with the registry; else it is the one for GenAI


@dataclass(frozen=True)
class Shot:
    """One picture. `ready` is a JavaScript expression: true once the page shows what the picture is for."""

    name: str
    url: str
    ready: str


def shots() -> list[Shot]:
    """The pages of the preset's newest completed flow run. Raises `UserError` if there is none."""
    settings, _ = open_stack()
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateName,
    )
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as prefect:
        found = prefect.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["pipeline"])),
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[PRESET])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(name=FlowRunFilterStateName(any_=["Completed"]))),
            sort=FlowRunSort.END_TIME_DESC,
            limit=1,
        )
    if not found:
        raise UserError(f"there is no finished run: `unbroken run {PRESET}` makes one")
    key = found[0].labels[RUN_KEY_LABEL]
    mlflow = tracking.connect(settings.mlflow_uri)
    version = mlflow.search_model_versions(f"name = '{PRESET}' and tags.`{tracking.RUN_KEY_TAG}` = '{key}'")[0]
    experiment_id = mlflow.get_run(version.run_id).info.experiment_id
    run = tracking.run_url(settings.mlflow_uri, experiment_id, version.run_id).partition("?")[0]
    graph = "performance.getEntriesByType('resource').some(e => e.name.endsWith('/graph-v2'))"
    figure = "[...document.images].some(i => i.alt.endsWith('confusion.png') && i.complete && i.naturalWidth)"
    return [
        Shot("prefect-run", f"{settings.prefect_ui_url}/runs/flow-run/{found[0].id}", graph),
        Shot("mlflow-metrics", f"{run}/model-metrics?{CLASSIC}", "document.querySelectorAll('.js-line').length > 3"),
        Shot("mlflow-confusion", f"{run}/artifacts/figures/confusion.png?{CLASSIC}", figure),
        Shot(
            "mlflow-registry",
            f"{settings.mlflow_uri}/#/models/{PRESET}?{CLASSIC}",
            "document.body.innerText.includes('champion')",
        ),
    ]


class Page:
    """One browser tab, driven through the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._last_id = 0
        self._session: dict[str, str] = {}
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        self._call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)

    def _call(self, method: str, **parameters: Any) -> Any:
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": parameters, **self._session}))
        while (reply := json.loads(self._socket.recv(TIMEOUT_SECONDS))).get("id") != self._last_id:
            pass  # an event: nobody asked
        if "error" in reply:
            raise InfrastructureError(f"the browser refused {method}: {reply['error']}")
        return reply["result"]

    def photograph(self, shot: Shot) -> bytes:
        """The page as PNG, once it is ready, without open panels, and still."""
        self._call("Page.navigate", url="about:blank")  # else only the part after # changes, and nothing is loaded
        self._call("Page.navigate", url=shot.url)
        start = changed = time.monotonic()
        before = b""
        while time.monotonic() < start + TIMEOUT_SECONDS:
            self._call("Runtime.evaluate", expression=CLOSE_PANELS)
            is_ready = self._call("Runtime.evaluate", expression=shot.ready)["result"].get("value")
            picture = base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"])
            if is_ready is not True or picture != before:
                before, changed = picture, time.monotonic()
            elif time.monotonic() > changed + STILL_SECONDS:
                return picture
            time.sleep(0.5)
        raise InfrastructureError(f"{shot.url} did not show what {shot.name}.png is for in {TIMEOUT_SECONDS:.0f} s")


@contextmanager
def open_browser() -> Iterator[Page]:
    """A headless browser without a past. Raises `UserError` if none is installed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        raise UserError("no browser on the PATH: install Chromium (Debian, Ubuntu: `apt-get install chromium`)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *FLAGS, f"--window-size={WIDTH},{HEIGHT}", f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with connect(_devtools_url(Path(profile), process), max_size=None, proxy=None) as socket:
                yield Page(socket)
        finally:
            process.terminate()
            process.wait()


def _devtools_url(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser listens: it writes the port and the path into its profile."""
    path = profile / "DevToolsActivePort"
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if path.is_file() and len(lines := path.read_text().splitlines()) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.1)
    raise InfrastructureError("the browser did not start")


def save(picture: bytes, path: Path) -> None:
    """Write it as a small PNG: as it is, or else in 256 colours."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    wanted = shots()
    with open_browser() as page:
        for shot in wanted:
            path = FOLDER / f"{shot.name}.png"
            save(page.photograph(shot), path)
            print(f"{path.name}  {path.stat().st_size // 1000} KB  {shot.url}")


if __name__ == "__main__":
    try:
        main()
    except UnbrokenError as error:
        print(f"take.py: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
