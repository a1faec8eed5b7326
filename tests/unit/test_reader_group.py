"""Readers outlive a signal to their rank's whole process group, as the rank does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, signal, time
import torch
from torch.utils.data import DataLoader, IterableDataset
from training import forking
from training.data.loader import _fork_server


class Numbers(IterableDataset):
    def __iter__(self):
        for number in range(40):
            time.sleep(0.05)
            yield number


if __name__ == "__main__":
    for number in forking.STOP_SIGNALS:
        signal.signal(number, forking._leave_to_the_agent)
    loader = DataLoader(
        Numbers(), batch_size=None, num_workers=1, multiprocessing_context=_fork_server(), generator=torch.Generator()
    )
    numbers = iter(loader)
    next(numbers)
    os.killpg(0, signal.SIGTERM)
    print(sum(1 for _ in numbers), flush=True)
"""


def test_a_signal_to_the_ranks_group_ends_no_reader(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)  # what it gives to its readers must be found by them
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        start_new_session=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.stdout.split() == ["39"], done.stderr
