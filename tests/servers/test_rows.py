"""Rows of tables in the place of whole ones: sums, norms and optimizers' steps, to the last bit; what cannot be so is
refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from tests.servers.looking_up import LookingUp, Lookup
from tests.unit.tiny import NUM_INPUTS, exact_arithmetic, make_trainer, tiny_preset
from training.arithmetic.norm import BLOCK_ELEMENTS, block_norms
from training.arithmetic.sparse import Rows, rows_of, tables_of
from training.diagnosis.poison import Replay
from training.errors import UserError
from training.servers.arithmetic import Decision, TensorState, part_of, put
from training.servers.colocated import Colocated
from training.servers.layout import Piece, shards
from training.servers.protocol import Hold
from training.servers.rows import Part, block_norms_of
from training.servers.stillness import require_still
from training.servers.wire import decode, encode

NUM_ROWS, WIDTH = 9, 3
PRESET = tiny_preset()
SERVED = replace(PRESET, train=replace(PRESET.train, strategy="parameter_server"))


def some_rows(seed: int, *, num_rows: int = NUM_ROWS, width: int = WIDTH) -> Rows:
    """A third of a table, with zeros of both signs among the values."""
    chance = torch.Generator().manual_seed(seed)
    numbers = torch.randperm(num_rows, generator=chance)[: num_rows // 3].sort().values
    values = torch.randn(len(numbers), width, generator=chance)
    values[::2, 0] = -0.0
    values[1:2, -1] = 0.0
    return Rows(numbers=numbers, values=values)


def whole(rows: Rows, num_rows: int = NUM_ROWS) -> Tensor:
    table = torch.zeros(num_rows, rows.values.shape[1])
    table[rows.numbers] = rows.values
    return table


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def test_a_sum_of_rows_is_that_of_whole_tables_zeros_signs_too() -> None:
    for seed in range(20):
        one, other = some_rows(seed), some_rows(seed + 100)
        expected = whole(one) + whole(other)
        found = one.add_(other)
        assert found.numbers.tolist() == sorted({*one.numbers.tolist(), *other.numbers.tolist()})
        assert bits(whole(found)) == bits(expected)


def test_a_sparse_gradient_has_the_bits_of_a_dense_one() -> None:
    numbers = torch.randint(0, 50, (40, 30), generator=torch.Generator().manual_seed(1))
    gradients = []
    for is_sparse in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(1000, 7, sparse=is_sparse)
        embedding(numbers).tanh().pow(3).sum().backward()
        assert embedding.weight.grad is not None
        gradients.append(embedding.weight.grad)
    assert bits(whole(rows_of(gradients[0]), 1000)) == bits(gradients[1])


@pytest.mark.parametrize("width", [1, 3, 48, 64])
def test_norms_of_blocks_are_those_of_whole_tables(width: int) -> None:
    num_rows = 5 * BLOCK_ELEMENTS // width + 1
    rows = some_rows(3, num_rows=num_rows, width=width)
    few = Rows(numbers=rows.numbers[:5], values=rows.values[:5])
    none = Rows(numbers=rows.numbers[:0], values=rows.values[:0])
    for some in (rows, few, none):
        found = block_norms_of(some, Piece(0, 0, num_rows * width, width))
        assert bits(found) == bits(block_norms([whole(some, num_rows)]))


def test_no_row_is_cut_and_shards_are_fair() -> None:
    sizes = [BLOCK_ELEMENTS + 5, 48 * 100_000, 7]
    for num_shards in (1, 2, 4, 7):
        found = shards(sizes, num_shards, {1: 48})
        pieces = [piece for shard in found for piece in shard if piece.parameter == 1]
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert all(piece.start % piece.unit_elements == 0 for piece in pieces)
        assert all(piece.start % 48 == 0 == piece.start % BLOCK_ELEMENTS for piece in pieces)
        assert sum(len(piece.rows) for piece in pieces) == 100_000
        counts = [sum(piece.num_elements for piece in shard) for shard in found]
        assert all(abs(count - sum(sizes) / num_shards) <= math.lcm(48, BLOCK_ELEMENTS) for count in counts)


def test_what_is_cut_for_shards_comes_together_again() -> None:
    num_rows = 3 * BLOCK_ELEMENTS // 4
    rows, dense = some_rows(5, num_rows=num_rows, width=4), torch.randn(9)
    parameters = [torch.zeros(num_rows, 4), torch.zeros(9)]
    for shard in shards([num_rows * 4, 9], 3, {0: 4}):
        part = part_of({0: rows, 1: dense}, shard)
        assert isinstance(part, Part)
        put(part, shard, parameters)
    assert bits(parameters[0]) == bits(whole(rows, num_rows))
    assert bits(parameters[1]) == bits(dense)


def test_a_copy_knows_what_the_last_step_changed() -> None:
    shard = shards([NUM_ROWS * WIDTH], 1, {0: WIDTH})[0]
    tables = [nn.Parameter(torch.ones(NUM_ROWS, WIDTH)) for _ in range(2)]
    original, copy = (TensorState(Adagrad([table], lr=0.1), [table], shard) for table in tables)
    decision = Decision(grad_norm=1.0, clip_norm=None, learning_rate_scale=1.0, extras=torch.empty(0))
    for seed in range(2):
        original.apply(Part(dense=torch.empty(0), tables=(some_rows(seed),)), decision)
    copy.load(original.snapshot(), 2)
    for state in (original, copy):
        changes = state.changes()
        assert isinstance(changes, Part)
        assert bits(changes.tables[0].numbers) == bits(some_rows(1).numbers)
        assert bits(changes.tables[0].values) == bits(original.values().view(-1, WIDTH)[some_rows(1).numbers])


def test_a_part_goes_over_the_wire() -> None:
    sent = Hold(token=1, step=2, total=Part(dense=torch.ones(2), tables=(some_rows(1), some_rows(2))))
    head, buffers = encode(sent)
    left = memoryview(b"".join([head, *buffers]))

    def read_into(view: memoryview) -> None:
        nonlocal left
        view[:], left = left[: len(view)], left[len(view) :]

    found = decode(read_into, max_bytes=1 << 20)
    assert isinstance(found, Hold)
    assert bits(found.total.dense) == bits(sent.total.dense)
    for one, other in zip(found.total.tables, sent.total.tables, strict=True):
        assert (bits(one.numbers), bits(one.values)) == (bits(other.numbers), bits(other.values))


STILL = {
    "sgd": partial(SGD, lr=0.1),
    "adagrad": partial(Adagrad, lr=0.1),
    "adagrad that slows down": partial(Adagrad, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5),
}
MOVING = {
    "momentum": partial(SGD, lr=0.1, momentum=0.9),
    "weight decay": partial(SGD, lr=0.1, weight_decay=0.1),
    "adam": partial(Adam, lr=0.1),
    "adamw": partial(AdamW, lr=0.1),
    "running mean": partial(RMSprop, lr=0.1),
    "adagrad with weight decay": partial(Adagrad, lr=0.1, weight_decay=0.1),
    "uphill, which makes -0 of a row 0": partial(SGD, lr=0.1, maximize=True),
}


def require(make: Any) -> None:
    table = nn.Parameter(torch.zeros(NUM_ROWS, WIDTH))
    require_still(make([table]), {table})


@pytest.mark.parametrize("name", STILL)
def test_optimizers_that_leave_other_rows_alone_may_see_some(name: str) -> None:
    require(STILL[name])


@pytest.mark.parametrize("name", MOVING)
def test_optimizers_that_move_other_rows_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"have no gradient, .* SGD without these, or Adagrad; or use sparse=False"):
        require(MOVING[name])


def test_what_counts_are_the_settings_of_the_tables_group() -> None:
    table, other = nn.Parameter(torch.zeros(NUM_ROWS, WIDTH)), nn.Parameter(torch.zeros(2))
    groups: list[dict[str, Any]] = [{"params": [table], "momentum": 0.0}, {"params": [other]}]
    require_still(SGD(groups, lr=0.1, momentum=0.9), {table})
    with pytest.raises(UserError, match="SGD, changes rows"):
        require_still(SGD(groups, lr=0.1, momentum=0.9), {other})
    require_still(Adam([other]), set())


class MovingLookup(Lookup):
    """Its rows have momentum."""

    def optimizer(self, model: nn.Module) -> Optimizer:
        return SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_group_says_so_before_its_first_step() -> None:
    servers = Colocated(MovingLookup(), SERVED, address="127.0.0.1", secret="s")
    state = make_trainer(preset=SERVED, recipe=MovingLookup()).state
    assert not servers.can_go_on(None, nodes=[0])
    with pytest.raises(UserError, match="SGD, changes rows"):
        servers.begin(state, token=1, rank=0)


class Tied(LookingUp):
    """Multiplies with its table as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x[:, :1] * self.narrow.weight[0])


class Twice(LookingUp):
    """Looks some rows up, and then others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x + 1)


class Beside(LookingUp):
    """The same, past the module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + functional.embedding(x[:, 0].to(torch.int64), self.narrow.weight, sparse=True)


MISUSES = {Tied: "is used otherwise", Twice: "is looked up twice for one loss", Beside: "is used otherwise"}


@dataclass(frozen=True, kw_only=True)
class Misused(Lookup):
    kind: type[LookingUp] = Tied

    def model(self) -> nn.Module:
        return self.kind(is_sparse=True)


@pytest.mark.parametrize("kind", MISUSES)
def test_a_table_that_is_used_otherwise_is_refused_by_name(kind: type[LookingUp]) -> None:
    servers = Colocated(Misused(kind=kind), SERVED, address="127.0.0.1", secret="s")
    trainer = make_trainer(preset=SERVED, recipe=Misused(kind=kind), servers=servers)
    assert not servers.can_go_on(None, nodes=[0])
    servers.begin(trainer.state, token=1, rank=0)
    with exact_arithmetic(), pytest.raises(UserError, match=f"a table of shape .* {MISUSES[kind]}"):
        trainer.train_step()


def test_a_failure_is_looked_for_in_sparse_gradients_too() -> None:
    trainer = make_trainer(preset=SERVED, recipe=Lookup())
    trainer.extras.hold()
    replay = Replay(Lookup(), trainer.state, trainer.extras, seed=1, precision="float32")
    x, label = torch.rand(4, NUM_INPUTS), torch.zeros(4, dtype=torch.int64)
    assert replay.failure(0, {"x": x, "label": label}) == ""
    torch.nn.init.constant_(trainer.state.model.narrow.weight, 3e38)
    assert replay.failure(0, {"x": x, "label": label}) == "the loss is not finite"


def test_a_table_that_changes_as_it_is_looked_up_is_refused() -> None:
    with pytest.raises(UserError, match="leave max_norm out"):
        tables_of(nn.Embedding(3, 2, max_norm=1.0, sparse=True))


def test_frozen_and_dense_embeddings_are_no_tables() -> None:
    frozen = nn.Embedding(3, 2, sparse=True).requires_grad_(False)
    model = nn.ModuleList([nn.Embedding(3, 2), frozen, found := nn.Embedding(3, 2, sparse=True)])
    assert tables_of(model) == [found.weight]
