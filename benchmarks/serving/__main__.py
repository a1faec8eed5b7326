"""`python -m benchmarks.serving`: requests per second and p99, as ratios to `mlflow models serve` in the same round.

The same file of the digits model (its weights are as at the start: they cost the same), and a store of the bench's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.data.store import make_bucket, running_store
from benchmarks.environments import ENVIRONMENTS, ROOT
from infra.local.ports import free_port
from tasks.lifecycle.model_file import KeptVersion, Signature, Tensor, file_key, version_key
from tasks.register import save_model
from training.documents import digest_of, sha256_hex
from training.preset_file import load_preset
from training.recipe import load_recipe
from training.s3.objectstore import Store, StoreLocation

BUCKET = "serving"
BASE = "mlflow, 1 worker"
CONTESTANTS = {
    BASE: "`mlflow models serve`, 1 worker",
    "mlflow, 2 workers": "`mlflow models serve`, 2 workers",
    "unbroken": "**Unbroken**, 2 server processes",
}
ROW_SHAPE = (1, 8, 8)
START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked, and by how many clients at once."""

    num_clients: int
    num_rows: int

    @property
    def title(self) -> str:
        return (
            f"{self.num_clients} client{'s' * (self.num_clients > 1)}, {self.num_rows} row{'s' * (self.num_rows > 1)}"
        )


CASES = tuple(Case(num_clients=clients, num_rows=rows) for clients, rows in ((1, 1), (16, 1), (64, 1), (16, 32)))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One contestant in one round."""

    requests_per_second: float
    p99_seconds: float


def save_folder(folder: Path) -> Path:
    """The MLflow model, as registration saves it. Returns its program's file."""
    recipe = load_recipe(load_preset("digits"))
    save_model(recipe.model().eval(), np.zeros((2, *ROW_SHAPE), np.float32), folder, None)
    return folder / "data" / "model.pt2"


def publish(store: Store, file: Path) -> None:
    data = file.read_bytes()
    kept = KeptVersion(
        model="digits",
        version="1",
        run_key="",
        weights_sha256="",
        dataset_digest="",
        model_sha256=sha256_hex(data),
        num_bytes=len(data),
        signature=Signature(
            inputs=Tensor(dtype="float32", shape=(-1, *ROW_SHAPE)), outputs=Tensor(dtype="float32", shape=(-1, 10))
        ),
    )
    store.put_immutable(file_key(kept.model, kept.model_sha256), data)
    store.create_versioned(
        version_key(kept.model, kept.version), {"format": 1, "kept": asdict(kept), "sha256": digest_of(asdict(kept))}
    )


@contextmanager
def server(name: str, folder: Path, endpoint: str, log: Path) -> Iterator[int]:
    """A contestant that is ready. Gives its port."""
    port = free_port()
    if name == "unbroken":
        command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", "digits/1", "--port", str(port)]
    else:
        workers = name.split()[1]
        command = [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local"),
            *("--port", str(port), "--workers", workers),
        ]
    variables = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "UNBROKEN_S3_ENDPOINT": endpoint,
        "UNBROKEN_S3_BUCKET": BUCKET,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, env=os.environ | variables, stdout=errors, stderr=errors, start_new_session=True, cwd=ROOT
        )
    try:
        _wait_ready(port, process, log)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a server did not start: see {log}") from None
            time.sleep(0.2)
        else:
            return


def ask(port: int, case: Case, seconds: float, body: Path) -> Measured:
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving.load",
        str(port),
        str(case.num_clients),
        str(seconds),
        str(body),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    latencies = sorted(json.loads(done.stdout))
    return Measured(requests_per_second=len(latencies) / seconds, p99_seconds=latencies[int(len(latencies) * 0.99)])


def measure(
    ports: Mapping[str, int], cases: Sequence[Case], rounds: int, seconds: float, folder: Path
) -> dict[str, dict[str, list[Measured]]]:
    """By case and contestant, in an order that rotates. A round before the first warms up."""
    found: dict[str, dict[str, list[Measured]]] = {case.title: {name: [] for name in ports} for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            body = folder / "body.json"
            rows = np.random.default_rng(number).random((case.num_rows, *ROW_SHAPE)).round(3)
            body.write_text(json.dumps({"inputs": rows.tolist()}))
            names = list(ports)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                measured = ask(ports[name], case, seconds if number else 1.0, body)
                if number:
                    found[case.title][name].append(measured)
    return found


def as_markdown(found: Mapping[str, Mapping[str, Sequence[Measured]]]) -> str:
    """Requests per second over the base's in the same round, and p99 in milliseconds: median (min–max)."""
    names = list(next(iter(found.values())))
    lines = [
        "| requests/s as a ratio; p99, median (min–max) | " + " | ".join(CONTESTANTS[name] for name in names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for title, by_name in found.items():
        cells = []
        for name in names:
            pairs = zip(by_name[name], by_name[BASE], strict=True)
            ratios = [mine.requests_per_second / base.requests_per_second for mine, base in pairs]
            p99 = [measured.p99_seconds * 1000 for measured in by_name[name]]
            rate = statistics.median(measured.requests_per_second for measured in by_name[name])
            cells.append(f"{rate:.0f}/s, {_spread(ratios, 2)}; {_spread(p99, 1)} ms")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each contestant and case in a round")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--out", type=Path, default=ENVIRONMENTS / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case.num_clients in arguments.clients]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unbroken-bench-")))
        stack.enter_context(running_store(folder / "store"))
        make_bucket(BUCKET)
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        publish(Store(StoreLocation(endpoint=endpoint, bucket=BUCKET)), save_folder(folder / "model"))
        log = arguments.out / "serving.log"
        ports = {name: stack.enter_context(server(name, folder / "model", endpoint, log)) for name in CONTESTANTS}
        found = measure(ports, cases, arguments.rounds, arguments.seconds, folder)
    about = {"rounds": arguments.rounds, "cpus": os.cpu_count(), "os": platform.platform()}
    single = {title: {name: [asdict(one) for one in all_] for name, all_ in by.items()} for title, by in found.items()}
    (arguments.out / "serving.json").write_text(json.dumps({**about, "found": single}, indent=1) + "\n")
    text = as_markdown(found)
    (arguments.out / "serving.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
