"""Real ranks with bounded staleness: none is further ahead than it may be, each sample is read once, and what is saved
is of one step."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from tests.distributed.groups import ENTRY, Group, Node, Pause, calm, make_node, regroup
from tests.distributed.pausing import MID_STEP
from tests.servers.modes import has_checkpoint
from tests.servers.stale_history import Applied, HasRead, Operation, check
from tests.servers.wide import Wide
from tests.unit.tiny import exact_arithmetic, make_trainer, stale_preset
from training.checkpoints.checkpoint import load_checkpoint
from training.cluster.zygote import Zygote
from training.control import EXIT_STOPPED
from training.s3.objectstore import Store
from training.servers.stale_state import HISTORY_FOLDER

STEPS, EVERY, BOUND = 24, 12, 2


PRESET = replace(
    stale_preset(staleness=BOUND, steps=STEPS, checkpoint_every_steps=EVERY, validate_every_steps=8),
    recipe="tests.servers.wide:Wide",
)
SYNCHRONOUS = replace(PRESET, train=replace(PRESET.train, staleness=0))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the ranks write what their shards did: of all tests, one after another."""
    folder = tmp_path_factory.mktemp("history")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HISTORY_FOLDER, str(folder))
        yield folder


@pytest.fixture(scope="module")
def zygote(history: Path) -> Iterator[Zygote]:
    with closing(Zygote(PRESET, entry=ENTRY)) as running:
        yield running


@pytest.fixture
def node(store: Store, zygote: Zygote, history: Path) -> Iterator[Node]:
    for path in history.iterdir():
        path.unlink()
    with closing(make_node(store, zygote, preset=PRESET, recipe=Wide())) as made:
        yield made


def operations(history: Path, *, token: int, num_shards: int) -> list[Operation]:
    """What the shards of a group did, one shard after the other."""
    found: list[Operation] = []
    for shard in range(num_shards):
        for line in (history / f"shard-{shard}-token-{token}.jsonl").read_text().splitlines():
            told = json.loads(line)
            if "applied" in told:
                found.append(Applied(shard, told["place"], told["applied"], told["token"]))
            else:
                found.append(HasRead(shard, told["place"], told["read"], token, tuple(told["seen"])))
    return found


def greatest_lead(history: Path, *, num_places: int, token: int = 1, num_shards: int = 2, start: int = 0) -> int:
    """Once all rules are known to hold."""
    done = operations(history, token=token, num_shards=num_shards)
    return check(done, num_shards=num_shards, num_places=num_places, bound=BOUND, start=start)


def require_whole(node: Node) -> Sequence[float]:
    """The run has ended, and its ledger is that of a run in one process. Returns the losses."""
    record = node.run.read()
    assert record.result is not None
    assert record.result.step == STEPS
    synchronous = calm(preset=SYNCHRONOUS, recipe=Wide(), steps=STEPS)[1]
    assert [(step, samples) for step, _, samples, _ in node.told()] == [
        (step, samples) for step, _, samples, _ in synchronous
    ]
    assert [step for step, _, _, validation in node.told() if validation] == [8, 16, 24]
    return [loss for _, loss, _, _ in node.told()]


def test_quick_ranks_run_ahead_of_a_stopped_one_and_no_further_than_they_may(node: Node, history: Path) -> None:
    """The one shard is on rank 0, so it answers meanwhile."""

    async def act(group: Group) -> None:
        await group.paused(1)
        group.freeze(1)
        for rank in (0, 2):
            await group.waits(rank, step=4 + BOUND)
        os.kill(group.pids()[1], signal.SIGCONT)
        group.go_on(1)

    group = node.train(3, act, pauses={1: Pause(MID_STEP, 4)}, servers=1, server_replicas=1)
    assert group.codes() == [0, 0, 0]
    assert greatest_lead(history, num_places=3, num_shards=1) == BOUND, "what is allowed is made use of"
    losses = require_whole(node)
    assert mean(losses[-6:]) < mean(losses[:6])


@pytest.mark.slow
def test_at_a_barrier_all_read_the_same(node: Node, history: Path) -> None:
    node.train(2, servers=2, server_replicas=1)
    greatest_lead(history, num_places=2)
    reads = [one for one in operations(history, token=1, num_shards=2) if isinstance(one, HasRead)]
    assert {one.seen for one in reads if one.step in (8, 12, 16, 24)} == {(step, step) for step in (8, 12, 16, 24)}
    require_whole(node)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_costs_the_steps_since_the_checkpoint(node: Node, history: Path, victim: int) -> None:
    async def act(group: Group) -> None:
        await group.paused(victim)
        await has_checkpoint(node, EVERY)
        await group.waits(1 - victim, step=EVERY + 1 + BOUND)
        group.kill(victim)

    first = node.train(2, act, pauses={victim: Pause(MID_STEP, EVERY + 1)}, servers=1 + victim, server_replicas=1)
    assert first.codes()[victim] == -signal.SIGKILL
    node.train(3, servers=2, server_replicas=1)
    assert node.attempts() == [(2, 0, "start"), (3, EVERY, "checkpoint")]
    greatest_lead(history, num_places=3, token=2, start=EVERY)
    require_whole(node)


def test_a_group_that_is_to_end_does_so_soon_with_a_checkpoint(node: Node) -> None:
    """The other rank has come to the step after 1 + BOUND, and hears of it once it has pushed that."""

    async def act(group: Group) -> None:
        await group.waits(0, step=1 + BOUND)
        await regroup(group)

    first = node.train(2, act, pauses={1: Pause(MID_STEP, 1)}, servers=2, server_replicas=1)
    assert first.codes() == [EXIT_STOPPED, EXIT_STOPPED]
    node.train(1, servers=2, server_replicas=1)
    num_ranks, step, source = node.attempts()[-1]
    assert (num_ranks, source) == (1, "checkpoint")
    assert step <= 4 + BOUND
    require_whole(node)


@pytest.mark.slow
def test_a_synchronous_run_goes_on_from_its_checkpoint(node: Node) -> None:
    node.train(2, servers=2, server_replicas=1)
    record = node.run.read()
    newest = record.checkpoints[-1]
    tensors = load_checkpoint(node.run.store, node.run.prefix(record), newest)
    trainer = make_trainer(
        preset=replace(SYNCHRONOUS, train=replace(SYNCHRONOUS.train, steps=2 * STEPS)), recipe=Wide()
    )
    trainer.state.load(tensors, step=newest.step)
    assert record.result is not None
    assert trainer.state.state_sha256() == record.result.state_sha256
    with exact_arithmetic():
        losses = [trainer.train_step().loss for _ in range(STEPS)]
    assert mean(losses) < mean(loss for _, loss, _, _ in node.told())
