"""One line per finished step, as all contestants' ranks print it."""

from __future__ import annotations

import json
import time


def print_step(number: int, *, num_ranks: int, group: str) -> None:
    print(json.dumps({"time": time.time(), "number": number, "num_ranks": num_ranks, "group": group}), flush=True)
