"""What each layout of a model costs a rank: memory, bytes sent, time in which it waits. Pure arithmetic: no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from training.arithmetic.reduce import num_rows, owned_range, subtrees
from training.layout import Layout, Schedule, layouts
from training.parallel.schedule import bubble, chunks_per_rank, num_in_flight

SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a model that is not cut: one of the recipe's `blocks`, or what is before or after them."""

    weight_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    """What the backward pass of one virtual worker needs of it, beside weights."""
    output_bytes: int
    """What one virtual worker gives to the next part."""
    exchanged_bytes: int = 0
    """What a rank with a part of each matrix says of one virtual worker to those with the others, forward and back."""


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Parts in the order in which they are computed: before the blocks, each block, after them; or the whole alone."""

    parts: tuple[Part, ...]
    cut: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)
    """The same where so many ranks have a part of each matrix, of one of them."""
    whole_sequences: frozenset[int] = frozenset()
    """Of these numbers of ranks each has all of the sequences, as they cannot be cut."""

    def at(self, tensor: int) -> ModelCost:
        """Of a rank with one of so many parts."""
        return self if tensor == 1 else replace(self, parts=self.cut[tensor])

    @property
    def max_stages(self) -> int:
        """Into so many the recipe lets the model be cut."""
        return max(1, len(self.parts) - 2)

    @property
    def weight_bytes(self) -> int:
        return sum(part.weight_bytes for part in self.parts)

    def stages(self, number: int) -> list[tuple[Part, ...]]:
        """Consecutive parts, cut between blocks, with as many blocks each, as far as that goes."""
        if number == 1:
            return [self.parts]
        first, *blocks, last = self.parts
        cuts = [owned_range(stage, number, len(blocks)) for stage in range(number)]
        found = [blocks[cut.start : cut.stop] for cut in cuts]
        found[0].insert(0, first)
        found[-1].append(last)
        return [tuple(parts) for parts in found]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of the rank that needs most."""

    layout: Layout
    schedule: Schedule | None
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    sent_bytes: int
    """In one step."""
    bubble: float
    """The share of a step in which it waits for other stages."""

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


def costs(model: ModelCost, *, num_ranks: int, virtual_workers: int) -> list[Cost]:
    """Of all layouts of so many ranks; those with a pipeline once for each schedule that has the blocks and the
    virtual workers it needs: each rank has one, and those with parts of the same matrices have the same ones."""
    found: list[Cost] = []
    all_layouts = layouts(
        num_ranks, max_pipeline=model.max_stages, max_tensor=max(model.cut, default=1), max_feeds=virtual_workers
    )
    for layout in all_layouts:
        if (layout.tensor > 1 and layout.tensor not in model.cut) or num_ranks > virtual_workers * layout.tensor:
            continue
        for schedule in SCHEDULES if layout.pipeline > 1 else (None,):
            chunks = layout.pipeline * (chunks_per_rank(schedule) if schedule else 1)
            is_even = virtual_workers % (layout.num_feeds * layout.pipeline) == 0
            if chunks <= model.max_stages and (schedule != "interleaved" or is_even):
                found.append(cost(model, layout, schedule, virtual_workers=virtual_workers))
    return found


def cost(model: ModelCost, layout: Layout, schedule: Schedule | None, *, virtual_workers: int) -> Cost:
    """Of the stage that needs most memory."""
    num_chunks = layout.pipeline * (chunks_per_rank(schedule) if schedule else 1)
    chunks = model.at(layout.tensor).stages(num_chunks)
    stages = [_of_stage(chunks, stage, layout, schedule, virtual_workers) for stage in range(layout.pipeline)]
    return max(stages, key=lambda one: one.memory_bytes)


def recommended(found: Sequence[Cost], *, memory_bytes: int | None) -> Cost:
    """The smallest bubble, then the fewest bytes sent, of those that fit; if none does, the least memory."""
    fitting = [one for one in found if memory_bytes is None or one.memory_bytes <= memory_bytes]
    if not fitting:
        return min(found, key=lambda one: one.memory_bytes)
    return min(fitting, key=lambda one: (one.bubble, one.sent_bytes, one.memory_bytes))


def _of_stage(
    chunks: Sequence[tuple[Part, ...]], stage: int, layout: Layout, schedule: Schedule | None, virtual_workers: int
) -> Cost:
    own = list(range(stage, len(chunks), layout.pipeline))
    parts = [part for number in own for part in chunks[number]]
    weights = sum(part.weight_bytes for part in parts)
    owned = owned_range(0, layout.num_feeds, virtual_workers)
    num_workers = -(-virtual_workers // layout.num_feeds)
    in_flight, waiting, passed = Fraction(1), Fraction(0), 0
    if schedule is not None:
        about = {"num_stages": layout.pipeline, "num_microbatches": num_workers}
        in_flight = num_in_flight(schedule, stage=stage, **about)
        waiting = bubble(schedule, **about)
        outputs = [chunks[number][-1].output_bytes for number in own if number < len(chunks) - 1]
        inputs = [chunks[number - 1][-1].output_bytes for number in own if number]
        passed = num_workers * (sum(outputs) + sum(inputs))
    exchanged = num_workers * sum(part.exchanged_bytes for part in parts)
    largest = max(part.weight_bytes for part in parts)
    return Cost(
        layout=layout,
        schedule=schedule,
        weight_bytes=_kept(weights, largest, layout.shard),
        gradient_bytes=_gradients(weights, largest, owned, layout, virtual_workers),
        optimizer_bytes=sum(part.optimizer_bytes for part in parts) // layout.shard,
        activation_bytes=int(in_flight * sum(part.saved_bytes for part in parts)),
        sent_bytes=passed + exchanged + _sent(weights, owned, num_workers, layout),
        bubble=float(waiting),
    )


def _kept(weights: int, largest: int, num_shards: int) -> int:
    """A shard, and what is gathered at a time: a block, and what is before and after all."""
    return weights if num_shards == 1 else weights // num_shards + min(weights, 2 * largest)


def _gradients(weights: int, largest: int, owned: range, layout: Layout, virtual_workers: int) -> int:
    """Those of the backward pass, the sums of subtrees, and what comes from other ranks (training.arithmetic.exact,
    training.parallel.sharded). With shards a block's last ones are sent, and forgotten, as soon as they are there."""
    plans = [subtrees(owned_range(feed, layout.num_feeds, virtual_workers)) for feed in range(layout.num_feeds)]
    if layout.shard == 1:
        rows = num_rows(subtrees(owned))
        is_in_place = layout.data == 1 or [len(plan) for plan in plans] == [1, 1]
        received = 0 if is_in_place else weights + weights * sum(map(len, plans)) // layout.num_feeds
        return weights + rows * weights + received
    sums = max(number + subtree.level for number, subtree in enumerate(subtrees(owned)))
    return weights // layout.shard + sums * weights + min(weights, 2 * largest)


def _sent(weights: int, owned: range, num_workers: int, layout: Layout) -> int:
    """Each rank keeps its own part of what it has."""
    rows = len(subtrees(owned))
    if layout.num_feeds == 1:
        return 0
    if layout.shard == 1:
        return (rows + 1) * weights * (layout.data - 1) // layout.data
    gathered = 2 * num_workers * weights * (layout.shard - 1) // layout.shard
    scattered = rows * weights * (layout.shard - 1) // layout.shard
    among_replicas = 2 * (weights // layout.shard) * (layout.data - 1) // layout.data
    return gathered + scattered + among_replicas
