"""The recommender: what its samples are, that it learns, and that servers change none of its bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.power_law import lines
from tests.unit.tiny import MemoryReader, exact_arithmetic, make_trainer, tiny_preset
from training.loop import Trainer
from training.preset_file import load_preset
from training.recipe import Record, load_recipe
from training.recipes.pairs import Clicks, Pairs, Words
from training.servers.colocated import Colocated

SMALL = {"num_rows": 5000, "width": 8, "num_others": 3}
WORDS, CLICKS = Words(**SMALL), Clicks(**SMALL)
CHANCE = 1 / (1 + SMALL["num_others"])
PRESET = tiny_preset(steps=60, batch_size=160, virtual_workers=5, clip_norm=1.0)


def read(recipe: Pairs) -> MemoryReader:
    if recipe is WORDS:
        (table,) = WORDS.encode(Record(id="decoder.py", data=Path(json.decoder.__file__).read_bytes()))
        return MemoryReader(table.columns)
    samples = [sample for line in lines(4000) for sample in CLICKS.encode(Record(id="clicks.csv:1", data=line))]
    return MemoryReader({"rows": np.stack([sample["rows"] for sample in samples])})


def trained(recipe: Pairs, *, num_servers: int) -> Trainer:
    train = replace(PRESET.train, strategy="parameter_server" if num_servers else "all_reduce")
    preset = replace(PRESET, train=train, launch=replace(PRESET.launch, servers=max(1, num_servers)))
    servers = Colocated(recipe, preset, address="127.0.0.1", secret="s") if num_servers else None
    trainer = make_trainer(preset=preset, recipe=recipe, reader=read(recipe), servers=servers)
    if servers is not None:
        assert not servers.can_go_on(None, nodes=[0])
        servers.begin(trainer.state, token=1, rank=0)
    with exact_arithmetic():
        for _ in range(PRESET.train.steps):
            trainer.train_step()
    return trainer


@pytest.mark.parametrize("recipe", [WORDS, CLICKS], ids=["words", "clicks"])
def test_it_learns_and_servers_change_no_bit(recipe: Pairs) -> None:
    expected, found = (trained(recipe, num_servers=number) for number in (0, 2))
    assert found.state.weights_sha256() == expected.state.weights_sha256()
    rows = torch.from_numpy(read(recipe).read(range(1000))[1]["rows"])
    with torch.no_grad():
        accuracy = recipe.scores(found.state.model, {"rows": rows})["accuracy"].mean()
    assert accuracy > 1.4 * CHANCE


def test_words_stand_with_those_that_follow_them() -> None:
    text = b" ".join(b"w%d" % number for number in range(100))
    (table,) = Words(num_rows=1 << 20, num_others=2, window=3).encode(Record(id="a", data=text))
    rows = [Words(num_rows=1 << 20).row(b"w%d" % number) for number in range(100)]
    found = table.columns["rows"]
    assert found[:, 0].tolist() == rows[:97]
    assert found[:4, 1].tolist() == [rows[1], rows[3], rows[5], rows[4]]
    assert found[0, 2:].tolist() == [rows[7919 % 100], rows[2 * 7919 % 100]]
    assert not list(WORDS.encode(Record(id="a", data=b"too few words")))


def test_a_line_that_is_no_click_is_refused() -> None:
    for data in (b"somebody", b",item", b"user,"):
        with pytest.raises(ValueError, match="a user and an item"):
            CLICKS.encode(Record(id="a:1", data=data)).__iter__().__next__()


def test_few_have_most_of_the_clicks() -> None:
    users = [line.split(b",")[0] for line in lines(10_000)]
    counts = sorted((users.count(user) for user in set(users)), reverse=True)
    assert lines(10_000) == lines(10_000)
    assert sum(counts[:20]) > 0.4 * len(users) > 20 * len(counts[:20])
    assert len(counts) > 1000


def test_the_preset_is_of_servers() -> None:
    preset = load_preset("words")
    assert preset.train.strategy == "parameter_server"
    assert isinstance(load_recipe(preset), Words)
