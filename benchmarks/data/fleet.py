"""The contestants and their processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.data.contestants.protocol import Outcome, Task
from benchmarks.environments import ROOT, Contestant

FLOOR = Contestant("floor", "floor")
OURS = Contestant("unbroken", "**Unbroken**")
CONTESTANTS = (
    FLOOR,
    OURS,
    Contestant("litdata", "LitData", ("litdata==0.2.76", "boto3")),
    Contestant("streaming", "MosaicML Streaming", ("mosaicml-streaming==0.13.0", "boto3")),
    Contestant("webdataset", "WebDataset", ("webdataset==1.0.2", "torch", "boto3")),
    Contestant("parquet", "Parquet", ("pyarrow==26.0.1", "numpy", "boto3")),
)


@dataclass
class Runner:
    """Asks a contestant for one measurement after another; starts it anew if it was stopped."""

    contestant: Contestant
    python: str
    log: Path
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def ask(self, task: Task, *, limit_seconds: float) -> Outcome:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(task)) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], limit_seconds)[0]:
            self.stop()
            return Outcome(error=f"no end after {limit_seconds:.0f} s")
        line = process.stdout.readline()
        if not line:
            self.stop()
            return Outcome(error=f"it died: see {self.log}")
        return Outcome(**json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [self.python, "-m", f"benchmarks.data.contestants.{self.contestant.name}"],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        return self._process

    def stop(self) -> None:
        """End it and whatever it started: they are a process group of their own."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None
