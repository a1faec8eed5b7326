"""What processes leave in shared memory."""

from __future__ import annotations

import os
from collections.abc import Collection

from tests.waiting import wait_until

OF_OTHERS = "faketime_"
"""How the names begin of what libfaketime keeps there, for as long as a test's clock is set, and if that is killed for
ever."""


def names() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if not name.startswith(OF_OTHERS)}


def require_no_more_than(before: Collection[str]) -> None:
    """Others come and go there meanwhile."""
    wait_until(lambda: names() <= set(before), what="nothing new to be left in shared memory")
