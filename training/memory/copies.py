"""Copies of a state that is in parts, one on each rank: made in the memory of two nodes each, so that one may be lost.

Every so many steps a rank writes its part into a slot, and that of a rank on another node beside it. There are two
slots (training.memory.slots): while one is written the other is whole, of a step that all ranks have copies of. The
next group joins the newest parts that are complete among its ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training import tensorfile
from training.arithmetic.collectives import of_all_ranks, texts_of_all_ranks
from training.checkpoints.snapshot import Image
from training.documents import fast_digest
from training.errors import InfrastructureError
from training.layout import Layout
from training.memory.live import live
from training.memory.slots import Held, entries_of, file_of, fingerprint_of, journal_bytes
from training.memory.transfer import give, take
from training.runs.events import Entry


@dataclass(frozen=True, order=True)
class Part:
    """The `index`-th of so many."""

    number: int
    index: int


@dataclass(frozen=True, kw_only=True)
class Complete:
    """Parts that make up a state."""

    step: int
    holders: Sequence[int]
    """Of each part: the lowest rank that has it."""


def distance(layout: Layout, processes_per_node: int) -> int:
    """From a rank to the one that keeps a copy of its part: it is on the next node. 0: nobody need, as there is one
    node alone, or each part is on several anyway."""
    nodes: dict[int, set[int]] = {}
    for rank in range(layout.num_ranks):
        nodes.setdefault(layout.coordinates(rank).shard, set()).add(rank // processes_per_node)
    is_elsewhere = all(len(places) > 1 for places in nodes.values())
    return 0 if layout.num_ranks <= processes_per_node or is_elsewhere else processes_per_node


def named(part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are named in a slot, and one more without a name: a part is there if it has no tensor, too."""
    is_there = {"": torch.ones(1, dtype=torch.uint8)}
    return {f"{part.index}/{part.number}|{name}": tensor for name, tensor in {**is_there, **tensors}.items()}


def parts_in(held: Held) -> dict[Part, dict[str, Tensor]]:
    """The inverse, of all parts that are there."""
    found: dict[Part, dict[str, Tensor]] = {}
    for full_name, tensor in tensorfile.tensors(file_of(held)).items():
        about, _, name = full_name.partition("|")
        index, number = map(int, about.split("/"))
        tensors_of_part = found.setdefault(Part(number, index), {})
        if name:
            tensors_of_part[name] = tensor
    return found


def swapped(tensors: Mapping[str, Tensor], step: int, *, rank: int, num_ranks: int, distance: int) -> dict[str, Tensor]:
    """Those of the rank so far before this one, which go on as far from here. Collective."""
    own = live(run_key="", generation=0, step=step, tensors=tensors, entries=())
    before, after = (rank - distance) % num_ranks, (rank + distance) % num_ranks
    gives_first = rank // distance % 2 == 0  # in each ring somebody takes first, or all would wait
    if gives_first:
        give(own, after)
    _, found = take(before, _new_places)
    if not gives_first:
        give(own, after)
    return dict(found)


def _new_places(layout: tensorfile.Layout) -> dict[str, Tensor]:
    return {name: torch.empty(place.shape, dtype=place.dtype) for name, place in layout.items()}


def newest_complete(told: Sequence[Sequence[tuple[int, Sequence[Part]]]]) -> Complete | None:
    """`told` by each rank: the steps that it has copies of, and which parts."""
    holders: dict[tuple[int, int], dict[int, int]] = {}
    for rank, copies in reversed(list(enumerate(told))):
        for step, parts in copies:
            for part in parts:
                holders.setdefault((step, part.number), {})[part.index] = rank
    whole = [about for about, found in holders.items() if len(found) == about[1]]
    if not whole:
        return None
    step, number = max(whole)
    return Complete(step=step, holders=[holders[step, number][index] for index in range(number)])


def agreed(own: Sequence[Held]) -> Complete | None:
    """What all ranks go on with. Collective."""
    mine = [[held.step, [[part.number, part.index] for part in parts_in(held)]] for held in own]
    told = [json.loads(text) for text in texts_of_all_ranks(json.dumps(mine))]
    return newest_complete([[(step, [Part(*part) for part in parts]) for step, parts in each] for each in told])


def gathered(complete: Complete, own: Sequence[Held], *, rank: int) -> tuple[list[dict[str, Tensor]], Sequence[Entry]]:
    """All parts of it, on each rank, and the journal of whoever has the first. Collective. Raises `InfrastructureError`
    if something did not arrive whole, after all was sent: others wait for nothing then."""
    of_step = [held for held in own if held.step == complete.step]
    parts = {part: tensors for held in of_step for part, tensors in parts_in(held).items()}
    number, heard = len(complete.holders), []
    for index, holder in enumerate(complete.holders):
        file = _file(parts[Part(number, index)]) if holder == rank else bytearray()
        heard.append(_maybe_heard(file, holder))
    journal = bytearray(journal_bytes(of_step[0].entries) if of_step else b"")
    heard.append(_maybe_heard(journal, complete.holders[0]))
    whole = [memory for memory in heard if memory is not None]
    if len(whole) < len(heard):
        raise InfrastructureError(f"copies in memory of step {complete.step} did not arrive whole")
    *files, entries = whole
    return [tensorfile.tensors(file) for file in files], entries_of(entries)


def _maybe_heard(file: bytearray, holder: int) -> memoryview | None:
    """What the holder has, by all; None if it did not arrive whole."""
    mine = torch.tensor([len(file), fingerprint_of(fast_digest(memoryview(file)))])
    size, fingerprint = of_all_ranks(mine)[holder].tolist()
    place = memoryview(file if dist.get_rank() == holder else bytearray(size))
    dist.broadcast(torch.frombuffer(place, dtype=torch.uint8), holder)
    return place if fingerprint_of(fast_digest(place)) == fingerprint else None


def _file(tensors: Mapping[str, Tensor]) -> bytearray:
    image = Image(tensors)
    file = bytearray(image.num_bytes)
    image.write(memoryview(file))
    return file
