"""The bits of exact mode, on any number of servers and workers; optimizers that cannot be cut are refused."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.arithmetic.norm import BLOCK_ELEMENTS, block_norms, clip_factor, norm_of
from training.arithmetic.reduce import Subtree, TreeSum, owned_range, subtrees
from training.errors import UserError
from training.servers.arithmetic import Decision, TensorState, decide, pieces_of, require_elementwise
from training.servers.client import Client
from training.servers.layout import Shard, shards
from training.servers.protocol import Assignment, Send
from training.servers.replica import Replica

V, STEPS, CLIP = 6, 4, 0.5
SIZES = [BLOCK_ELEMENTS + 5, 7, 3 * BLOCK_ELEMENTS]

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """Parameters of some blocks each, whose gradients are made up."""

    def __init__(self) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList([torch.randn(size, generator=chance) for size in SIZES])


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.1)


def gradient(step: int, leaf: int, values: Tensor) -> Tensor:
    """Depends on the parameters, so that a wrong bit stays."""
    chance = torch.Generator().manual_seed(100 * step + leaf)
    return values * torch.randn(len(values), generator=chance) / V


def sums(step: int, leaves: range, values: Tensor) -> list[tuple[Subtree, Tensor]]:
    found = []
    for subtree in subtrees(leaves):
        tree = TreeSum()
        for leaf in range(subtree.start, subtree.start + subtree.size):
            tree.push(0, gradient(step, leaf, values))
        found.append((subtree, tree.total()))
    return found


def one_process(make: Make, *, num_steps: int = STEPS) -> Tensor:
    net = Net()
    optimizer = make(net)
    parameters = list(net.parameters())
    for step in range(1, num_steps + 1):
        values = torch.cat([p.detach() for p in parameters])
        ((_, total),) = _whole(sums(step, range(V), values))
        for parameter, grad in zip(parameters, torch.split(total, SIZES), strict=True):
            parameter.grad = grad
        gradients = [p.grad for p in parameters if p.grad is not None]
        factor = clip_factor(norm_of(block_norms(gradients)), CLIP)
        assert factor is not None
        torch._foreach_mul_(gradients, factor)
        optimizer.step()
    return torch.cat([p.detach() for p in parameters])


def _whole(parts: Sequence[tuple[Subtree, Tensor]]) -> list[tuple[Subtree, Tensor]]:
    tree = TreeSum()
    for subtree, value in parts:
        tree.push(subtree.level, value)
    return [(Subtree(0, V), tree.total())]


def elements(vector: Tensor, shard: Shard) -> Tensor:
    return pieces_of(torch.split(vector, SIZES), shard)


class Group:
    """Servers and workers that send to one another by calls."""

    def __init__(self, make: Make, *, num_shards: int, num_workers: int, num_replicas: int) -> None:
        self.shards = shards(SIZES, num_shards)
        self.queue: deque[tuple[str, Send]] = deque()
        self.processes: dict[str, Any] = {}
        primaries = [f"server {shard}.0" for shard in range(num_shards)]
        for number, shard in enumerate(self.shards):
            names = [f"server {number}.{replica}" for replica in range(num_replicas)]
            for name in names:
                net = Net()
                state = TensorState(make(net), list(net.parameters()), shard)
                self.processes[name] = Replica(name, state, num_virtual_workers=V)
                self.processes[name].fill()
            assignment = Assignment(token=1, primary=names[0], backups=tuple(names[1:]))
            for name in names:
                self.send(name, self.processes[name].begin(assignment))
        choose = partial(decide, clip_norm=CLIP, learning_rate_scale=1.0)
        for place in range(num_workers):
            self.processes[f"worker {place}"] = Client(token=1, primaries=primaries, decide=choose)
        self.workers = [(self.processes[f"worker {n}"], owned_range(n, num_workers, V)) for n in range(num_workers)]

    def send(self, sender: str, sends: Sequence[Send]) -> None:
        self.queue.extend((sender, send) for send in sends)
        while self.queue:
            source, sent = self.queue.popleft()
            self.queue.extend((sent.to, send) for send in self.processes[sent.to].handle(source, sent.message))

    def train(self) -> Tensor:
        self.send("worker 0", self.workers[0][0].pull())
        for step in range(1, STEPS + 1):
            values = torch.cat([value for _, value in self.workers[0][0].values()])
            for number, (client, leaves) in enumerate(self.workers):
                parts = sums(step, leaves, values)
                for at, shard in enumerate(self.shards):
                    part = [(tree, elements(total, shard)) for tree, total in parts]
                    self.send(f"worker {number}", client.push(step, at, part))
        found = self.workers[-1][0].values()
        assert [step for step, _ in found] == [STEPS] * len(self.shards)
        return torch.cat([value for _, value in found])


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_the_bits_are_those_of_one_process(num_workers: int, num_shards: int) -> None:
    group = Group(adamw, num_shards=num_shards, num_workers=num_workers, num_replicas=2)
    assert torch.equal(group.train(), one_process(adamw))
    for shard in range(num_shards):
        states = [group.processes[f"server {shard}.{replica}"].state for replica in range(2)]
        assert torch.equal(*(state.values() for state in states)), "a backup has the same bits"


def test_a_copy_goes_on_as_the_original_would() -> None:
    shard = shards(SIZES, 2)[1]
    states = [TensorState(adamw(net := Net()), list(net.parameters()), shard) for _ in range(2)]
    decision = Decision(grad_norm=2.0, clip_norm=1.0, learning_rate_scale=0.5, extras=torch.empty(0))
    total = elements(gradient(1, 0, torch.cat([p.detach() for p in Net().parameters()])), shard)
    states[0].apply(total.clone(), decision)
    states[1].load(states[0].snapshot(), 1)
    for state in states:
        state.apply(total.clone(), decision)
    assert torch.equal(states[0].values(), states[1].values())
    assert states[1].step == 2


def test_optimizers_that_look_at_single_elements_may_be_cut() -> None:
    require_elementwise(adamw)
    require_elementwise(lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    require_elementwise(lambda module: torch.optim.Adagrad(module.parameters(), lr=0.1))


class Normed(torch.optim.SGD):
    """Divides by the norm of the whole parameter, as LARS does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = nn.functional.normalize(parameter.grad, dim=0)
        return super().step(closure)


def test_an_optimizer_that_looks_at_whole_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"Normed, gives other bits .* use train.strategy = 'all_reduce'"):
        require_elementwise(lambda module: Normed(module.parameters(), lr=0.1))


class MatricesOnly(torch.optim.SGD):
    """Decays matrices, and not vectors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(0.9 if parameter.ndim > 1 else 1.0)
        return super().step(closure)


def test_an_optimizer_that_looks_at_shapes_is_refused() -> None:
    with pytest.raises(UserError, match="MatricesOnly, gives other bits"):
        require_elementwise(lambda module: MatricesOnly(module.parameters(), lr=0.1))


def test_a_total_that_goes_to_a_backup_later_is_not_written_into() -> None:
    net, shard = Net(), shards(SIZES, 1)[0]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    state, total = TensorState(optimizer, list(net.parameters()), shard), torch.ones(sum(SIZES))
    for clip_norm in (None, 0.5):
        state.apply(total, Decision(grad_norm=1.0, clip_norm=clip_norm, learning_rate_scale=1.0, extras=torch.empty(0)))
        assert torch.equal(total, torch.ones(sum(SIZES)))


class Decaying(torch.optim.SGD):
    """Keeps the momentum that comes next in its group, as ASGD-like ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["momentum"] *= 0.5
        return super().step(closure)


def test_an_optimizer_that_keeps_state_beside_the_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"Decaying, keeps setting_number.0.momentum"):
        require_elementwise(lambda module: Decaying(module.parameters(), lr=0.1, momentum=0.9))


def test_shards_are_balanced_and_cut_no_block() -> None:
    for sizes in ([], [1], [10 * BLOCK_ELEMENTS + 1], [5] * 40, SIZES):
        for num_shards in (1, 2, 3, 4, 7):
            found = shards(sizes, num_shards)
            assert len(found) == num_shards
            covered = [(p.parameter, element) for shard in found for p in shard for element in (p.start, p.stop)]
            assert covered == sorted(covered)
            counts = [sum(piece.num_elements for piece in shard) for shard in found]
            assert sum(counts) == sum(sizes)
            assert all(abs(count - sum(sizes) / num_shards) <= BLOCK_ELEMENTS for count in counts)
            assert all(p.start % BLOCK_ELEMENTS == 0 for shard in found for p in shard)
