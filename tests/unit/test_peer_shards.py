"""What the bench of parameter servers has peers' servers do: it must be the step that ours makes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.servers.contestants.shard import Shard, parts_of
from benchmarks.servers.peers import FLOOR, OURS, ratios, turn
from benchmarks.servers.pushes import LEARNING_RATE, NUM_VARIANTS, Case, Deal

NUM_WORKERS = 3
ROWS = Case(num_rows=100, density=0.1)


@pytest.mark.parametrize("case", [Case(num_rows=100), ROWS], ids=["dense", "rows"])
def test_shards_make_the_step_of_the_sum(case: Case) -> None:
    parts = Deal(cases=[case], num_workers=NUM_WORKERS, num_servers=2).parts(case)
    shards = [Shard(case, part) for part in parts]
    wanted, found = case.parameter().detach(), case.parameter().detach()
    for variant in range(NUM_VARIANTS):
        for worker in range(NUM_WORKERS):
            gradient = case.gradient(worker, variant)
            wanted.index_add_(0, gradient.numbers, gradient.values, alpha=-LEARNING_RATE)
            for shard, part in zip(shards, parts_of(gradient, case, parts), strict=True):
                shard.add(part.clone())
        for shard, part in zip(shards, parts, strict=True):
            shard.step()
            rows, values = shard.changed if case.is_sparse else (slice(None), *shard.changed)
            found[part.start : part.stop][rows] = values
    assert wanted.count_nonzero() > 0
    assert torch.equal(found, wanted)


def test_a_deal_says_who_takes_part() -> None:
    deal = Deal(cases=[ROWS], num_workers=2, num_servers=1, num_replicas=2, way="memory")
    assert Deal.decode(deal.encode()) == deal
    assert deal.num_processes == 4, "a backup is in a process of its own"
    assert Deal(cases=[ROWS], num_workers=2).num_processes == 2, "an all-reduce has no server"


class Telling:
    """In the place of processes."""

    def __init__(self, *, digest: int, seconds: float) -> None:
        self._reply = {"digest": digest, "seconds": seconds}

    def ask(self, line: str) -> list[dict[str, float]]:
        return [self._reply, {**self._reply, "seconds": 1.0}]


def test_a_turn_is_as_long_as_its_slowest_worker() -> None:
    found = turn({FLOOR: Telling(digest=7, seconds=2.0)}, [FLOOR], case=0, num_times=4)  # type: ignore[dict-item]
    assert found == {FLOOR: 0.5}
    assert ratios([2.0, 1.0, 6.0], [1.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"


def test_who_ends_with_other_bits_is_not_compared() -> None:
    told = {FLOOR: Telling(digest=7, seconds=2.0), OURS[0]: Telling(digest=8, seconds=2.0)}
    with pytest.raises(SystemExit, match="the parameters differ"):
        turn(told, list(told), case=0, num_times=4)  # type: ignore[arg-type]
