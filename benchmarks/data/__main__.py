"""`make bench`: shard writing and reading against other libraries and the floor, in turn, on a real S3 server.

Every round runs each contestant once on each case, in an order that rotates; what is reported is the median over the
rounds of the ratio floor / contestant (1.00 is the floor's speed), with its least and greatest value.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cyclopts import App

from benchmarks.data.records import KINDS, expected
from infra.local.ports import INTERNAL, free_port
from infra.local.services import s3_service
from infra.settings import credentials_path
from training.objectstore import Store, StoreLocation

ROOT = Path(__file__).parents[2]
PEERS = {"litdata": "litdata", "streaming": "mosaicml-streaming", "webdataset": "webdataset"}
CONTESTANTS = ("floor", "ours", "parquet", *PEERS)
NO_SHUFFLE = ("parquet",)
TIMEOUT_SECONDS = 180
app = App(help="Benchmark of sharding and reading.", version_flags=[])


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is timed."""

    kind: str
    task: str
    num_processes: int

    @property
    def title(self) -> str:
        return f"{self.task}, {self.kind}, {self.num_processes} process{'es' * (self.num_processes > 1)}"


@dataclass
class Bench:
    """The servers, the environments and the seconds so far."""

    work: Path
    environment: dict[str, str]
    pythons: dict[str, str]
    seconds: dict[tuple[Case, str], list[float]] = field(default_factory=dict)
    disqualified: dict[tuple[Case, str], str] = field(default_factory=dict)

    def run(self, case: Case, name: str, number: int) -> None:
        """One contestant's turn. Whoever delivers the wrong samples is out, with the reason."""
        target = (
            f"s3://bench/{name}/{case.kind}"
            if case.task != "write"
            else f"s3://bench/write/{name}/{case.kind}/{number}"
        )
        self.seconds.setdefault((case, name), []).append(self.timed(case, name, target))

    def timed(self, case: Case, name: str, url: str) -> float:
        cache = self.work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        if name == "floor" and case.task != "write":
            url = f"s3://bench/ours/{case.kind}"
        command = [self.pythons[name], "-m", "benchmarks.data.contestant", name, case.task, case.kind, url]
        processes = [
            subprocess.Popen(
                [*command, str(cache / str(rank))],
                cwd=ROOT,
                env={**self.environment, **ranks(rank, case.num_processes)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(case.num_processes)
        ]
        replies = []
        for process in processes:
            output, errors = process.communicate(timeout=TIMEOUT_SECONDS)
            if process.returncode:
                self.disqualified[case, name] = errors.strip().splitlines()[-1][:200]
                return float("nan")
            replies.append(json.loads(output.strip().splitlines()[-1]))
        if case.task != "write":
            whole = expected(KINDS[case.kind])
            found = sum(reply["num_samples"] for reply in replies), sum(reply["total"] for reply in replies)
            if found != (whole.num_samples, whole.total):
                self.disqualified[case, name] = f"delivered {found[0]} of {whole.num_samples} samples, or wrong ones"
        return max(float(reply["seconds"]) for reply in replies)


def ranks(rank: int, world_size: int) -> dict[str, str]:
    """As torchrun and the peers name them."""
    return {
        "RANK": str(rank),
        "GLOBAL_RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "NNODES": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29511"),
    }


@contextmanager
def running_s3(work: Path) -> Iterator[dict[str, str]]:
    """A SeaweedFS of the bench's own; gives the environment in which everybody finds it."""
    ports = {name: free_port() for name in ("s3", *INTERNAL)}
    work.joinpath("logs").mkdir(parents=True)
    service = s3_service(work, ports)
    server = subprocess.Popen(service.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.environ.pop("AWS_PROFILE", None)
    os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(credentials_path(work))
    lines = dict(line.split(" = ") for line in credentials_path(work).read_text().splitlines() if " = " in line)
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": lines["aws_access_key_id"],
        "AWS_SECRET_ACCESS_KEY": lines["aws_secret_access_key"],
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": service.url,
        "AWS_ALLOW_HTTP": "true",
        "S3_ENDPOINT_URL": service.url,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    try:
        while not service.is_healthy():
            time.sleep(0.1)
        Store(StoreLocation(endpoint=service.url, bucket="bench")).create_bucket_if_missing()
        yield environment
    finally:
        server.terminate()
        server.wait()


def environments(folder: Path) -> dict[str, str]:
    """A Python for each contestant: peers get environments of their own, made once."""
    found = dict.fromkeys(CONTESTANTS, sys.executable)
    for name, package in PEERS.items():
        python = folder / package / "bin" / "python"
        if not python.exists():
            print(f"installing {package} …", flush=True)
            venv.create(folder / package, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", package, "torch", "numpy", "boto3", "obstore"]
            subprocess.run(install, check=True)
        found[name] = str(python)
    return found


def prepare(bench: Bench, kinds: tuple[str, ...]) -> None:
    """Have every contestant write the dataset that it reads."""
    for kind in kinds:
        for name in CONTESTANTS:
            if name != "floor":
                print(f"{name} writes its {kind}", flush=True)
                bench.timed(Case(kind=kind, task="write", num_processes=1), name, f"s3://bench/{name}/{kind}")


def table(bench: Bench, cases: list[Case]) -> str:
    lines = [f"| | {' | '.join(CONTESTANTS)} |", f"|---|{'---|' * len(CONTESTANTS)}"]
    for case in cases:
        lines.append(f"| {case.title} | " + " | ".join(cell(bench, case, name) for name in CONTESTANTS) + " |")
    return "\n".join(lines)


def cell(bench: Bench, case: Case, name: str) -> str:
    if (case, name) in bench.disqualified:
        return "out"
    if (case, name) not in bench.seconds:
        return "-"
    floor, own = bench.seconds[case, "floor"], bench.seconds[case, name]
    if name == "floor":
        return f"{statistics.median(floor):.2f} s"
    ratios = [a / b for a, b in zip(floor, own, strict=True)]
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}-{max(ratios):.2f})"


@app.default
def main(
    *,
    rounds: int = 7,
    kinds: tuple[str, ...] = ("image", "tokens"),
    processes: tuple[int, ...] = (1, 2),
    peers: Path = ROOT / ".venv-bench",
    out: Path = Path("benchmark-data.json"),
    quick: bool = False,
) -> None:
    """Run it, print a Markdown table, and write everything to OUT."""
    rounds, kinds, processes = (1, ("image",), (1,)) if quick else (rounds, kinds, processes)
    cases = [Case(kind=kind, task="write", num_processes=1) for kind in kinds]
    cases += [
        Case(kind=kind, task=task, num_processes=n)
        for kind in kinds
        for task in ("sequential", "shuffled")
        for n in processes
    ]
    with (
        tempfile.TemporaryDirectory(prefix="unbroken-bench-") as folder,
        running_s3(Path(folder) / "s3") as environment,
    ):
        bench = Bench(work=Path(folder), environment=environment, pythons=environments(peers))
        prepare(bench, kinds)
        for number in range(rounds + 1):
            if number == 1:
                bench.seconds.clear()  # the first round only warms up
            shift = number % len(CONTESTANTS)
            for case in cases:
                for name in (*CONTESTANTS[shift:], *CONTESTANTS[:shift]):
                    if not (case.task == "shuffled" and name in NO_SHUFFLE) and (case, name) not in bench.disqualified:
                        bench.run(case, name, number)
            print(f"round {number} of {rounds}\n{table(bench, cases)}", flush=True)
        report(bench, cases, rounds, out)


def report(bench: Bench, cases: list[Case], rounds: int, out: Path) -> None:
    for (case, name), reason in bench.disqualified.items():
        print(f"out: {name}, {case.title}: {reason}")
    rows: list[dict[str, Any]] = [
        {"case": case.title, "contestant": name, "seconds": seconds} for (case, name), seconds in bench.seconds.items()
    ]
    out.write_text(json.dumps({"rounds": rounds, "num_cpus": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    app()
