"""The bound of staleness holds in all that is recorded of many schedules, with slow, dying and cut-off workers; planted
bugs are caught."""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.evidence import write_evidence
from tests.servers.stale_history import Applied, HasRead, StaleError, check
from tests.servers.stale_world import Fault, StaleWorld
from training.servers import staleness
from training.servers.protocol import Send
from training.servers.stale_protocol import Fresh, Places, Read, Update
from training.servers.staleness import StaleShard

BOUNDS = (0, 1, 3, 8)
NUM_PLACES, NUM_SHARDS = 4, 2
SEEDS, SOAK_SEEDS = range(70), range(700)
"""Of each bound: of all together 10^5 operations at least, and 10^6."""


def world(seed: int, bound: int, **classes: Any) -> StaleWorld:
    """In two of three, workers are lost; in all, one or two are slow."""
    chance = random.Random(seed)
    faults = [
        Fault(at=chance.randrange(700), place=chance.randrange(NUM_PLACES), is_cut=chance.random() < 0.5)
        for _ in range(seed % 3)
    ]
    return StaleWorld(
        seed=seed,
        bound=bound,
        num_places=NUM_PLACES,
        num_shards=NUM_SHARDS,
        num_slow=1 + seed % 2,
        faults=faults,
        **classes,
    )


def judge(done: StaleWorld, bound: int) -> int:
    return check(done.history, num_shards=NUM_SHARDS, num_places=NUM_PLACES, bound=bound)


def row(bound: int, seeds: range) -> dict[str, Any]:
    """What came of the worlds of these seeds. Raises `AssertionError` if a rule breaks in one."""
    counts = {"operations": 0, "reads": 0, "lost_workers": 0, "greatest_lead": 0}
    for seed in seeds:
        done = world(seed, bound)
        done.run()
        counts["operations"] += len(done.history)
        counts["reads"] += sum(isinstance(operation, HasRead) for operation in done.history)
        counts["lost_workers"] += done.num_fired
        counts["greatest_lead"] = max(counts["greatest_lead"], judge(done, bound))
    return {"bound": bound, "seeds": [seeds.start, seeds.stop], **counts}


@pytest.mark.parametrize("bound", BOUNDS)
def test_no_worker_reads_what_is_too_old(bound: int) -> None:
    found = row(bound, SEEDS)
    assert found["operations"] > 25_000
    assert found["lost_workers"] > 50
    assert found["greatest_lead"] == bound, "what is allowed is made use of"


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_no_worker_reads_what_is_too_old_in_a_million_operations() -> None:
    rows = [row(bound, SOAK_SEEDS) for bound in BOUNDS]
    assert sum(one["operations"] for one in rows) > 1_000_000
    assert all(one["greatest_lead"] == one["bound"] for one in rows)
    write_evidence("bounded-staleness", rows=rows)


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A bug in the real source, in the place of a text that is there exactly once."""

    name: str
    old: str
    new: str

    def classes(self) -> dict[str, Any]:
        source = inspect.getsource(staleness)
        assert source.count(self.old) == 1, self.name
        changed: dict[str, Any] = {"__name__": "planted"}
        exec(compile(source.replace(self.old, self.new), staleness.__file__ or "", "exec", dont_inherit=True), changed)
        return {"make_shard": changed["StaleShard"], "make_worker": changed["StaleWorker"]}


PLANTED = (
    Planted(name="one step more is allowed", old="clock - bound\n", new="clock - bound - 1\n"),
    Planted(name="the quickest counts, not the slowest", old="min(self.clocks) >=", new="max(self.clocks) >="),
    Planted(name="a step is applied again", old="if message.clock == self.clocks[place] + 1:", new="if True:"),
    Planted(name="an older token is heard", old="if message.token < self.token:", new="if False:"),
    Planted(
        name="all who wait are answered once one is",
        old="if self._is_fresh(read)}",
        new="if any(map(self._is_fresh, self._waiting.values()))}",
    ),
    Planted(
        name="who takes a place over begins where one shard is", old="min(answer.clock for", new="max(answer.clock for"
    ),
    Planted(
        name="a worker goes on once one shard has answered",
        old="if len(self._answers) < len(self._shards):",
        new="if not self._answers:",
    ),
    Planted(
        name="a worker reads before it pushes",
        old="sends + self._read(is_barrier, wants_barrier)",
        new="self._read(is_barrier, wants_barrier) + sends",
    ),
)


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_planted_bugs_are_caught(bug: Planted) -> None:
    classes = bug.classes()
    for seed in range(60):
        for bound in (0, 3):
            done = world(seed, bound, **classes)
            try:
                done.run()
                judge(done, bound)
            except Exception:  # a crash counts
                return
    pytest.fail(f"{bug.name} survived")


def test_the_checker_names_what_is_broken() -> None:
    cases = {
        "twice, or out of turn": [Applied(0, 0, 1, 1), Applied(0, 0, 1, 1)],
        "an older token": [Applied(0, 0, 1, 2), Applied(0, 1, 1, 1)],
        "was not applied": [HasRead(0, 0, 0, 1, (1, 0))],
        "the reader's own": [Applied(0, 1, 1, 1), HasRead(0, 0, 1, 1, (0, 1))],
        "2 steps ahead": [Applied(0, 0, 1, 1), Applied(0, 0, 2, 1), HasRead(0, 0, 2, 1, (2, 0))],
    }
    for said, history in cases.items():
        with pytest.raises(StaleError, match=said):
            check(history, num_shards=1, num_places=2, bound=1)
    assert check([Applied(0, 0, 1, 1), HasRead(0, 0, 1, 1, (1, 0))], num_shards=1, num_places=2, bound=1) == 1


class Names:
    """What was applied, as a list."""

    def __init__(self) -> None:
        self.applied: list[str] = []

    def apply(self, place: int, update: str) -> None:
        self.applied.append(f"{update} of {place}")

    def values(self, place: int, clock: int) -> list[str]:
        return list(self.applied)


def test_a_read_waits_for_the_slowest_and_for_no_more() -> None:
    shard = StaleShard(Names(), num_places=2, bound=1)
    assert shard.begin(Places(token=1, workers=("quick", "slow"))) == []
    assert shard.begin(Places(token=1, workers=("other", "workers"))) == [], "a token begins once"
    for clock in (1, 2):
        shard.handle("quick", Update(token=1, clock=clock, update=f"step {clock}"))
    assert shard.handle("quick", Read(token=1, clock=2)) == []
    expected = Fresh(token=1, clock=2, barrier=0, values=["step 1 of 0", "step 2 of 0", "step 1 of 1"])
    assert shard.handle("slow", Update(token=1, clock=1, update="step 1")) == [Send(to="quick", message=expected)]


def barriers_heard(bound: int, chance: random.Random) -> dict[str, int]:
    """Of each place: the step before which it stopped, since all are to meet after it. One of them wanted that."""
    places = [str(place) for place in range(NUM_PLACES)]
    shard = StaleShard(Names(), num_places=NUM_PLACES, bound=bound)
    shard.begin(Places(token=1, workers=tuple(places)))
    heard = dict.fromkeys(places, Fresh(token=1, clock=0, barrier=0, values=None))
    computing, wants_after = set(places), chance.randrange(60)
    stopped: dict[str, int] = {}
    while computing:
        name = chance.choice(sorted(computing))
        computing.remove(name)
        clock = heard[name].clock + 1
        if clock == heard[name].barrier:
            stopped[name] = clock
            clock_of_others = [one.clock for one in heard.values()]
            assert max(clock_of_others) < clock, "nobody may have passed it"
        read = Read(token=1, clock=clock, is_barrier=name in stopped, wants_barrier=wants_after <= clock)
        for send in shard.handle(name, Update(token=1, clock=clock, update="")) + shard.handle(name, read):
            assert isinstance(send.message, Fresh)
            heard[send.to] = send.message
            if send.to not in stopped:
                computing.add(send.to)
    return stopped


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_barrier_that_one_wants_is_the_same_for_all_and_nobody_has_passed_it(bound: int) -> None:
    for seed in SEEDS:
        stopped = barriers_heard(bound, random.Random(seed))
        assert len(stopped) == NUM_PLACES
        assert len(set(stopped.values())) == 1


def test_each_place_has_one_worker() -> None:
    shard = StaleShard(Names(), num_places=2, bound=1)
    with pytest.raises(ValueError, match="1 workers for 2 places"):
        shard.begin(Places(token=1, workers=("alone",)))
