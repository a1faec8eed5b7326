"""Jobs of the local engine whose nodes do what a test tells them to."""

from __future__ import annotations

import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from infra.launcher import JobSpec, JobState
from infra.local.launcher import LocalLauncher
from tests.conftest import Stack
from tests.infra.probes import service_pid
from tests.waiting import wait_until

HEAD = """
import os, pathlib, signal, subprocess, sys, time
node, folder = sys.argv[1], pathlib.Path(sys.argv[2])
with (folder / f"starts-{node}").open("a") as file:
    file.write(f"{os.getpid()}\\n")
num_starts = len((folder / f"starts-{node}").read_text().split())
print(f"node {node} says hello", flush=True)
"""


@dataclass(kw_only=True)
class ToyJob:
    """A job whose nodes write down each of their starts and then run `body`."""

    launcher: LocalLauncher
    home: Path
    spec: JobSpec
    folder: Path

    def submit(self, *, owner: str | None = None) -> None:
        self.launcher.submit(replace(self.spec, owner=owner))

    def starts(self, node: int = 0) -> list[int]:
        """The process of each start of a node, oldest first."""
        path = self.folder / f"starts-{node}"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def wait_for_starts(self, count: int, node: int = 0) -> list[int]:
        wait_until(lambda: len(self.starts(node)) >= count, what=f"{count} starts of node {node}")
        return self.starts(node)

    def pid(self, node: int = 0) -> int:
        return service_pid(self.home, f"{self.spec.key}:node{node}")

    def state(self) -> JobState | None:
        status = self.launcher.find(self.spec.key)
        return status.state if status else None


@dataclass
class ToyJobs:
    """Makes toy jobs, and keeps them."""

    home: Path
    folder: Path
    made: list[ToyJob] = field(default_factory=list)

    def __call__(self, body: str = "signal.pause()", *, num_nodes: int = 1) -> ToyJob:
        key = uuid.uuid4().hex
        folder = self.folder / key
        folder.mkdir()
        (folder / "node.py").write_text(HEAD + textwrap.dedent(body))
        spec = JobSpec(
            key=key,
            num_nodes=num_nodes,
            command=(sys.executable, str(folder / "node.py"), "{node}", str(folder)),
            environment={"TOLD": "a 100%, b=c"},
        )
        job = ToyJob(launcher=LocalLauncher(self.home), home=self.home, spec=spec, folder=folder)
        self.made.append(job)
        return job


@pytest.fixture(scope="module")
def cancelling() -> Iterator[Callable[[ToyJob], None]]:
    """Cancels jobs beside the tests that come next: each takes the supervisor a second."""
    with ThreadPoolExecutor(8) as pool:
        cancelled: list[Future[None]] = []
        yield lambda job: cancelled.append(pool.submit(job.launcher.cancel, job.spec.key))
        for future in cancelled:
            future.result()


@pytest.fixture
def toy_job(stack: Stack, tmp_path: Path, cancelling: Callable[[ToyJob], None]) -> Iterator[Callable[..., ToyJob]]:
    jobs = ToyJobs(home=stack.home, folder=tmp_path)
    yield jobs
    for job in jobs.made:
        cancelling(job)
