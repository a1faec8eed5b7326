"""The local engine refuses what this machine will never have."""

from __future__ import annotations

import pytest

from infra.launcher import JobSpec, Needs
from infra.local.room import require_room
from training.errors import UserError


def spec(needs: Needs) -> JobSpec:
    return JobSpec(key="k", num_nodes=2, command=(), environment={}, needs=needs)


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        (Needs(num_cpus=10**6), r"launch.cpus_per_node = 1000000 is more than this machine has: \d+"),
        (Needs(num_gpus=100), r"launch.gpus_per_node = 100, 2 times, is more than this machine has: \d+"),
        (Needs(memory_bytes=1 << 60), r"launch.memory_bytes_per_node = \d+, 2 times, is more"),
        (Needs(priority="high"), r"launch.priority = 'high': the local engine has no queue"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(needs: Needs, said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_room(spec(needs))


def test_what_fits_is_taken() -> None:
    require_room(spec(Needs(num_cpus=1, memory_bytes=1 << 20, time_limit_seconds=60)))
