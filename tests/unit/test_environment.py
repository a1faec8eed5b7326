"""The environment fingerprint: what differs is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.environment import arithmetic, fingerprint, processor, require_same
from training.errors import UserError

NAMES = ["torch", "instruction_set", "threads", "device", "arithmetic"]


def test_the_same_environment_passes() -> None:
    here = fingerprint()
    assert set(here) == set(NAMES)
    require_same(dict(reversed(here.items())), here)


@pytest.mark.parametrize("name", NAMES)
def test_what_differs_is_named_with_both_values_and_nothing_else(name: str) -> None:
    here = fingerprint()
    with pytest.raises(UserError) as caught:
        require_same({**here, name: "other"}, here)
    message = str(caught.value)
    assert f"{name}: the run has other, this machine {here[name]}" in message
    assert all(f"{other}: the run" not in message for other in here if other != name)
    assert "--fresh" in message


def test_an_entry_that_only_one_side_has_differs() -> None:
    here = fingerprint()
    with pytest.raises(UserError, match=f"torch: the run has None, this machine {here['torch'][:4]}"):
        require_same({name: value for name, value in here.items() if name != "torch"}, here)
    with pytest.raises(UserError, match="cudnn: the run has 9, this machine None"):
        require_same({**here, "cudnn": "9"}, here)


def test_the_kind_of_cpu_is_named() -> None:
    cpuinfo = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: x\n\nprocessor\t: 1\n"
    assert processor(cpuinfo).endswith(" AuthenticAMD 25 17")
    assert processor("")


def test_other_arithmetic_shows_though_all_names_are_the_same() -> None:
    """As on a CPU for which MKL chooses other kernels. If this machine has one alone, the digest cannot differ."""
    if "vendor_id\t: GenuineIntel" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("only on Intel's CPUs does MKL let its kernels be chosen")
    code = "from training.environment import arithmetic; print(arithmetic())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() != arithmetic() == arithmetic()
