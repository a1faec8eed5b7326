"""Who keeps the others waiting."""

from __future__ import annotations

import pytest

from tasks.follow import Progress, _after
from training.runs.events import Event
from training.runs.pace import maybe_straggler


@pytest.mark.parametrize("seconds", [[], [1.0], [1.0, 1.4], [1.0, 1.0, 1.0], [0.0, 0.0], [0.5, 1.0, 1.1, 1.2]])
def test_nobody_is_slow(seconds: list[float]) -> None:
    assert maybe_straggler(seconds) is None


def test_the_slow_one_is_named_however_few_there_are() -> None:
    for seconds in ([1.0, 2.0], [0.9, 2.0, 1.0, 1.1]):
        found = maybe_straggler(seconds)
        assert found is not None
        assert found.rank == 1
        assert found.factor == pytest.approx(2.0)


def test_progress_names_the_slow_node_until_it_is_slow_no_more() -> None:
    slow = {"rank": 3, "node": 1, "factor": 2.04}
    progress = Progress(num_steps=9)
    for straggler, shown in ((slow, "node 1 is slow: rank 3 takes 2.0 times as long"), (None, "")):
        values = {"outside_seconds": [], "straggler": straggler}
        progress = _after(progress, Event(kind="pace", time=0.0, token=1, step=4, values=values))
        assert progress.slow == shown
        assert shown in progress.line()


def test_progress_shows_shares_that_are_not_even_until_the_group_ends() -> None:
    progress = Progress(num_steps=9)
    for kind, values, shown in (
        ("balance", {"shares": [6, 2, 4]}, "2 to 6 virtual workers per rank"),
        ("balance", {"shares": [3, 3, 2]}, ""),
        ("balance", {"shares": [1, 3]}, "1 to 3 virtual workers per rank"),
        ("attempt", {"world_size": 2}, ""),
    ):
        progress = _after(progress, Event(kind=kind, time=0.0, token=1, step=4, values=values))
        assert progress.balance == shown
        assert shown in progress.line()
