"""Real ranks with embedding tables on servers, row by row: the bits of whole gradients in one process, whoever dies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.distributed import groups
from tests.distributed.groups import Calm, Group, Node, Pause, kill_one_of_two, regroup, require_same
from tests.distributed.pausing import APPLIED, MID_STEP
from tests.servers.looking_up import WIDTHS, Lookup
from tests.servers.modes import train_in_both_modes
from tests.unit.tiny import exact_arithmetic, make_trainer
from training.arithmetic.reduce import Subtree
from training.config import Preset
from training.loop import Trainer
from training.servers.colocated import Colocated
from training.servers.endpoints import Remote
from training.servers.rows import Part

RECIPE = Lookup()
TRAIN = replace(groups.PRESET.train, strategy="parameter_server")
PRESET = replace(groups.PRESET, recipe="tests.servers.looking_up:Lookup", train=TRAIN)
zygote, node, _ = groups.fixtures(PRESET, RECIPE)
WITH_BACKUPS: dict[str, Any] = {"may_stay": True, "servers": 2, "server_replicas": 2}


@pytest.fixture(scope="module")
def calm() -> Calm:
    """With whole gradients of dense embeddings."""
    return groups.calm(preset=PRESET, recipe=Lookup(is_sparse=False))


def alone(recipe: Lookup, *, num_servers: int) -> Trainer:
    """A trainer of one rank, with servers in this process; without any if there are to be none."""
    if not num_servers:
        return make_trainer(preset=PRESET, recipe=recipe)
    preset: Preset = replace(PRESET, launch=replace(PRESET.launch, servers=num_servers))
    servers = Colocated(recipe, preset, address="127.0.0.1", secret="s")
    trainer = make_trainer(preset=PRESET, recipe=recipe, servers=servers)
    assert not servers.can_go_on(None, nodes=[0])
    servers.begin(trainer.state, token=1, rank=0)
    return trainer


def test_sparse_gradients_have_the_bits_of_dense_ones_without_servers(calm: Calm) -> None:
    assert groups.calm(preset=PRESET, recipe=RECIPE) == calm


@pytest.mark.parametrize("recipe", [RECIPE, Lookup(has_only_tables=True)], ids=["some", "all"])
def test_all_that_is_told_of_a_step_is_the_same(recipe: Lookup) -> None:
    trainers = [alone(recipe, num_servers=number) for number in (0, 1, 3)]
    with exact_arithmetic():
        for _ in range(4):
            told = []
            for trainer in trainers:
                trainer.train_step()
                values = trainer.handover.journal[-1].values
                told.append({name: value for name, value in values.items() if "second" not in name})
            assert told[0] == told[1] == told[2]
            assert "weights" in told[0]


def test_only_rows_that_were_looked_up_are_sent_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Sequence[tuple[Subtree, Part]]] = []
    answered: list[Part] = []
    push, finish = Remote.push, Remote.finish

    def recorded_push(self: Remote, step: int, shard: int, parts: Any, maybe_said: Any) -> None:
        pushed.append(parts)
        push(self, step, shard, parts, maybe_said)

    def recorded_finish(self: Remote) -> Any:
        decision, values = finish(self)
        answered.extend(values)
        return decision, values

    monkeypatch.setattr(Remote, "push", recorded_push)
    monkeypatch.setattr(Remote, "finish", recorded_finish)
    trainer = alone(RECIPE, num_servers=3)
    looked_up: dict[int, set[int]] = {width: set() for width in WIDTHS}
    for table in (trainer.state.model.wide, trainer.state.model.narrow):
        table.register_forward_pre_hook(
            lambda table, inputs: looked_up[table.embedding_dim].update(inputs[0].flatten().tolist())
        )
    with exact_arithmetic():
        trainer.train_step()
    assert len(pushed) == len(answered) == 3
    expected = {width: len(numbers) for width, numbers in looked_up.items()}
    assert all(0 < number < 200 for number in expected.values())
    assert _num_rows(answered) == expected
    for place in range(len(pushed[0])):  # of each subtree
        sent = _num_rows([shard[place][1] for shard in pushed])
        assert all(0 < sent[width] <= expected[width] for width in WIDTHS)


def _num_rows(parts: Sequence[Part]) -> dict[int, int]:
    """By the width of their table."""
    tables = [rows.values for part in parts for rows in part.tables]
    return {width: sum(len(values) for values in tables if values.shape[1] == width) for width in WIDTHS}


@pytest.mark.parametrize("num_servers", [1, 2, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_bits_are_those_of_whole_gradients(node: Node, calm: Calm, num_ranks: int, num_servers: int) -> None:
    node.train(num_ranks, servers=num_servers)
    require_same(node, calm)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_primary_that_dies_costs_the_step_that_it_was_in(node: Node, calm: Calm, victim: int) -> None:
    act = partial(kill_one_of_two, victim=victim, step=7)
    node.train(2, act, pauses={victim: Pause(MID_STEP, 7)}, **WITH_BACKUPS)
    node.train(2, **WITH_BACKUPS)
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


def test_what_a_step_changed_is_known_to_who_did_not_hear_of_it(node: Node, calm: Calm) -> None:
    """One shard has applied it, and no rank has its rows yet, when the other rank dies."""

    async def act(group: Group) -> None:
        await group.paused(0)
        group.kill(1)
        group.go_on(0)

    node.train(2, act, pauses={0: Pause(APPLIED, 8)}, **WITH_BACKUPS)
    node.train(2, **WITH_BACKUPS)
    assert node.attempts()[-1] == (2, 7, "memory")
    require_same(node, calm)


def test_tables_regroup_with_more_and_with_fewer_ranks(node: Node, calm: Calm) -> None:
    settings: dict[str, Any] = {"may_stay": True, "servers": 3, "server_replicas": 2}
    node.train(2, partial(regroup, rank=1), pauses={1: Pause(MID_STEP, 4)}, **settings)
    node.train(4, partial(regroup, rank=3), pauses={3: Pause(MID_STEP, 8)}, **settings)
    node.hands.pop(3).end()
    node.train(3, **settings)
    assert node.attempts()[-1][2] == "memory"
    require_same(node, calm)


def test_a_checkpoint_goes_on_without_servers_and_the_other_way_round(node: Node, calm: Calm) -> None:
    train_in_both_modes(node)
    require_same(node, calm)
