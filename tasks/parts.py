"""Work shared among processes of this machine: each is told its part in a file, and says beside it what went wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from training.errors import InfrastructureError, UnbrokenError, error_of

ERROR = ".error"
"""What a process that fails leaves beside the file that tells it its part."""


def run_parts(module: str, paths: Sequence[Path], *, what: str) -> None:
    """`python -m MODULE PATH` for each part at once, until all are done, or one has failed. Raises the error that it
    told of, or `InfrastructureError` if it died."""
    processes = [  # each out of the terminal's group: Ctrl-C is told to this process alone, which then kills them
        subprocess.Popen([sys.executable, "-P", "-m", module, str(path)], process_group=0) for path in paths
    ]
    try:
        for path, process in zip(paths, processes, strict=True):
            if process.wait() == 0:
                continue
            if path.with_suffix(ERROR).exists():
                raise error_of(**json.loads(path.with_suffix(ERROR).read_text()))
            raise InfrastructureError(
                f"process {path.stem} of {len(paths)} that {what} died with code {process.returncode}"
            )
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def errors_told(path: Path) -> Iterator[None]:
    """In such a process: what is raised goes to whoever started it, and ends this process."""
    try:
        yield
    except UnbrokenError as error:
        said = {"kind": type(error).__name__, "message": str(error), "records": getattr(error, "records", ())}
        path.with_suffix(ERROR).write_text(json.dumps(said))
        sys.exit(error.exit_code)
