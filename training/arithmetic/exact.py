"""Exact mode: gradients of all virtual workers, summed along the tree of reduce.py during the backward pass.

Parameters travel in buckets, the last ones first, since their gradients are ready first. When a rank's last virtual
worker has filled a bucket, a thread exchanges it: an all-to-all hands each rank one slice of every subtree's sum, it
adds these in tree order, and an all-gather returns the whole. Two ranks with one subtree each do an all-reduce instead.
(Buckets and overlap: PyTorch DDP, Li et al., VLDB'20.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.arithmetic.reduce import Place, Subtree, TreeSum, fold, num_rows, places, subtrees
from training.arithmetic.sparse import have_whole_gradients, tables_of
from training.errors import UserError

BUCKET_BYTES = 25 << 20


def plan_buckets(sizes: Sequence[int], max_elements: int) -> list[list[int]]:
    """Which parameters (by number) travel together: from the last one back, until a bucket is full."""
    buckets: list[list[int]] = [[]]
    filled = 0
    for number in reversed(range(len(sizes))):
        if buckets[-1] and filled + sizes[number] > max_elements:
            buckets.append([])
            filled = 0
        buckets[-1].append(number)
        filled += sizes[number]
    return buckets


@dataclass(frozen=True, kw_only=True)
class Giving:
    """To somebody else, who adds up what ranks have of all but tables (training.arithmetic.sparse): no rank hears of
    another."""

    buckets: list[list[int]]
    """Numbers of parameters, tables not counted."""
    give: Callable[[int], None]
    """Called by a thread for each bucket, in their order, once `sums` has what this rank has of it."""


class ExactReducer:
    """Mean gradients over all virtual workers, the same bits on any number of ranks.

    For each virtual worker of `owned`, in order: `forward`, then `backward`; then `finish`, which is collective.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        num_extras: int,
        ranges: Sequence[range],
        rank: int,
        bucket_bytes: int = BUCKET_BYTES,
        maybe_giving: Giving | None = None,
        maybe_processes: dist.ProcessGroup | None = None,
    ) -> None:
        """`objective` gives the loss of a batch; `num_extras` more numbers per virtual worker are summed alike.
        `ranges` are the virtual workers of each rank, from the first to the last; `rank` is this one's among
        `maybe_processes`, which are all unless it says which.

        Raises `UserError` if a parameter is not float32.
        """
        trained = [p for p in objective.parameters() if p.requires_grad]
        require_float32(trained)
        if maybe_giving is None:
            have_whole_gradients(objective)
        tables = set(tables_of(objective))
        parameters = [p for p in trained if p not in tables]
        self.owned = ranges[rank]
        self._objective = objective
        self._virtual_workers = ranges[-1].stop
        self._places = places(self.owned)
        if maybe_giving is None:
            group = Group(ranges, rank, trained[0].device, maybe_processes)
            planned = plan_buckets([p.numel() for p in parameters], bucket_bytes // 4)
        else:
            group = Group([self.owned], 0, trained[0].device)
            planned = maybe_giving.buckets
        self._planned = planned
        self._buckets = [
            Bucket(
                [parameters[n] for n in numbers], num_extras if numbers is planned[-1] else 0, group, self._when_full
            )
            for numbers in planned
        ]
        ends = [bucket.exchange for bucket in self._buckets]
        if maybe_giving is not None:
            ends = [partial(maybe_giving.give, number) for number in range(len(planned))]
        self._exchange = Exchange(self._buckets, ends)
        self._is_giving = maybe_giving is not None

    def forward(self, worker: int, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of one virtual worker's microbatch."""
        loss: Tensor = self._objective(batch)
        return loss

    def backward(self, worker: int, loss: Tensor, extras: Tensor) -> None:
        """Its gradients. A parameter that the loss does not reach counts as zeros."""
        for bucket in self._buckets:
            bucket.begin(self._places[worker])
        self._buckets[-1].add_extras(extras)
        (loss / self._virtual_workers).backward()  # type: ignore[no-untyped-call]  # torch has no annotation here
        for bucket in self._buckets:
            bucket.fill_up()

    def _when_full(self) -> None:
        self._exchange.start_full_ones()

    def finish(self) -> Tensor:
        """Put the mean gradients in their places; returns the sum of all extras."""
        self._exchange.wait()
        for bucket in self._buckets:
            bucket.hand_out()
        return self._buckets[-1].extras

    def sums(self) -> list[tuple[Subtree, list[Tensor], Tensor]]:
        """Of each of this rank's subtrees: the gradients, as the parameters are numbered, and the extras. They are
        overwritten in the next step."""
        return [(subtree, *self._sums_of(number)) for number, subtree in enumerate(subtrees(self.owned))]

    def wait(self) -> None:
        """Until all buckets were given. Raises what one of them raised."""
        self._exchange.wait()
        for bucket in self._buckets:
            bucket.is_full = False

    def _sums_of(self, subtree: int) -> tuple[list[Tensor], Tensor]:
        found: dict[int, Tensor] = {}
        extras = torch.empty(0)
        for numbers, bucket in zip(self._planned, self._buckets, strict=True):
            *views, extras = bucket.row(subtree)
            found |= zip(numbers, views, strict=True)
        return [found[number] for number in sorted(found)], extras

    def close(self) -> None:
        """Let the parameters go: another reducer may be made for them."""
        for bucket in self._buckets:
            bucket.close()
        self._exchange.close(wait=self._is_giving)
        self._buckets.clear()  # they and this hold one another, and garbage is seldom collected in a forked process


class Group:
    """The ranks, and which subtrees each of them adds up."""

    def __init__(
        self,
        ranges: Sequence[range],
        rank: int,
        device: torch.device,
        maybe_processes: dist.ProcessGroup | None = None,
    ) -> None:
        """`rank` is this one's among `maybe_processes`, which are all unless it says which."""
        self._maybe_processes = maybe_processes
        self.world_size = len(ranges)
        self.device = device
        self.plans = [subtrees(owned) for owned in ranges]
        self.own_plan = self.plans[rank]
        self.num_rows = num_rows(self.own_plan)
        self.is_pair = [len(plan) for plan in self.plans] == [1, 1]
        """The root has two terms, and a + b is b + a to the last bit: any all-reduce adds them up as the tree does."""
        self.is_in_place = self.world_size == 1 or self.is_pair
        """The sum over all virtual workers takes the place of this rank's first subtree's."""

    def exchange(self, rows: Tensor, received: Tensor, flat: Tensor) -> None:
        """From this rank's subtree sums (`rows`, [subtrees, n]) to the sum over all virtual workers (`flat`, [n])."""
        slice_size = flat.numel() // self.world_size
        everybody = [subtree for plan in self.plans for subtree in plan]
        if self.world_size == 1:
            fold(everybody, rows.unbind())  # adds into the first, which is `flat`, as it is for a pair
            return
        if self.is_pair:
            dist.all_reduce(flat, group=self._maybe_processes)
            return
        send = rows.view(len(rows), self.world_size, slice_size).transpose(0, 1).reshape(-1)
        counts = [len(plan) * slice_size for plan in self.plans]
        own_counts = [len(rows) * slice_size] * self.world_size
        dist.all_to_all_single(received, send, counts, own_counts, group=self._maybe_processes)
        dist.all_gather_single(flat, fold(everybody, torch.split(received, slice_size)), group=self._maybe_processes)


class Bucket:
    """Some parameters: their gradients added up along the tree as they come, then the sum over all ranks."""

    def __init__(
        self, parameters: Sequence[Tensor], num_extras: int, group: Group, when_full: Callable[[], None]
    ) -> None:
        self.is_full = False
        self._when_full = when_full
        self._parameters = parameters
        self._num_extras = num_extras
        self._group = group
        num_elements = sum(p.numel() for p in parameters) + num_extras
        slice_size = -(-num_elements // group.world_size)
        self._rows = torch.zeros(group.num_rows, slice_size * group.world_size, device=group.device)
        self._flat = self._rows[0] if group.is_in_place else torch.zeros_like(self._rows[0])
        num_received = 0 if group.is_in_place else sum(len(plan) for plan in group.plans) * slice_size
        self._received = torch.empty(num_received, device=group.device)
        self._row_views = [self._views(row) for row in self._rows]
        self._flat_views = self._views(self._flat)
        self._extras: Tensor | None = None
        self._missing: set[int] = set()
        self._tree = TreeSum[Tensor]()
        self._hooks = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, n))  # type: ignore[no-untyped-call]  # no annotation
            for n, p in enumerate(parameters)
        ]

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Its pieces: one like each parameter, and the extras."""
        sizes = [*(p.numel() for p in self._parameters), self._num_extras]
        *pieces, extras = torch.split(flat[: sum(sizes)], sizes)
        shaped = [piece.view(p.shape) for piece, p in zip(pieces, self._parameters, strict=True)]
        return [*shaped, extras]

    def row(self, subtree: int) -> list[Tensor]:
        """The sums of one of this rank's subtrees."""
        return self._row_views[subtree]

    def begin(self, place: Place) -> None:
        """The next virtual worker. Autograd itself adds a right sibling's gradients to the left one's."""
        self._place = place
        self._missing = set(range(len(self._parameters)))
        if not place.joins_sibling:
            self._extras = None
            for parameter in self._parameters:
                parameter.grad = None

    def add_extras(self, extras: Tensor) -> None:
        self._extras = extras if self._extras is None else self._extras.add_(extras)

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if number not in self._missing:
            raise UserError(
                f"a parameter of shape {list(parameter.shape)} gets its gradient in two goes, as under reentrant"
                " activation checkpointing: use torch.utils.checkpoint with use_reentrant=False"
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UserError(
                f"a parameter of shape {list(parameter.shape)} has a sparse gradient, and is not the weight of an"
                " nn.Embedding: use sparse=False"
            )
        self._missing.remove(number)
        if not self._missing:
            self._end_leaf()

    def fill_up(self) -> None:
        """Zeros for what the loss did not reach. They are added, not left out: -0 + 0 is 0."""
        for number in list(self._missing):
            parameter = self._parameters[number]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            else:
                parameter.grad.add_(0.0)
            self._arrived(number, parameter)
        if not self._parameters:  # all are tables, and what is here are the extras
            self._end_leaf()

    def _end_leaf(self) -> None:
        place = self._place
        if not place.joins_sibling and not place.ends_subtree:
            return  # its sibling comes next
        row = place.subtree + self._tree.num_waiting  # kept gradients would be new memory in each step, and cost more
        *views, extras = self._row_views[row]
        if views:
            torch._foreach_copy_(views, [p.grad for p in self._parameters if p.grad is not None])
        if self._extras is not None:
            extras.copy_(self._extras)
        self._tree.push(int(place.joins_sibling), self._rows[row])
        if place.ends_subtree:
            self._tree.total()  # it is in row `place.subtree`
        if place.ends_rank:
            self.is_full = True
            self._when_full()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None

    def exchange(self) -> None:
        self._group.exchange(self._rows[: len(self._group.own_plan)], self._received, self._flat)

    def hand_out(self) -> None:
        self.is_full = False
        for parameter, view in zip(self._parameters, self._flat_views, strict=False):
            parameter.grad = view

    @property
    def extras(self) -> Tensor:
        return self._flat_views[-1]


class Filled(Protocol):
    """A bucket, as `Exchange` sees it."""

    is_full: bool


class Exchange:
    """A thread that does the `ends` of full buckets in their order, which is the same on all ranks, whichever is full
    first."""

    def __init__(self, buckets: Sequence[Filled], ends: list[Callable[[], None]]) -> None:
        self._buckets = buckets
        self._ends = ends
        self._started: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="exchange")

    def start_full_ones(self) -> None:
        while len(self._started) < len(self._buckets) and self._buckets[len(self._started)].is_full:
            maybe_before = self._started[-1] if self._started else None
            end = self._ends[len(self._started)]
            self._started.append(self._pool.submit(_end_after, maybe_before, end))

    def wait(self) -> None:
        started, self._started = self._started, []
        try:
            for future in started:
                future.result()
        finally:
            started.clear()  # or an error would hold what it is of, by its traceback

    def close(self, *, wait: bool) -> None:
        """A collective may never end; to give never waits, and nothing may be given afterwards."""
        self._pool.shutdown(wait=wait)
        self._ends.clear()


def _end_after(maybe_before: Future[None] | None, end: Callable[[], None]) -> None:
    """After an error no more collectives: the one before is done, or its error is raised again."""
    if maybe_before is not None:
        maybe_before.result()
    end()


def require_float32(parameters: Sequence[Tensor]) -> None:
    wrong = [p.dtype for p in parameters if p.dtype != torch.float32]
    if wrong:
        raise UserError(f"the recipe's model has parameters of {wrong[0]}; exact mode needs float32")
    if not parameters:
        raise UserError("the recipe's model has no parameter to train")
