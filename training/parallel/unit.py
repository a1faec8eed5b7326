"""Parameters that are gathered together, of which each rank keeps a shard.

Their memory is emptied, not given up, when nobody needs it: what autograd keeps of a parameter is that memory, so it is
empty too until they are gathered anew. Nobody else may see it: torch empties no memory that numpy has seen.
(FSDP: Zhao et al., VLDB'23; ZeRO: Rajbhandari et al., SC'20.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.servers.layout import Shard, shards


class Unit:
    """All ranks of a group have one of the same parameters, each with its own shard. Whole when it is made."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        owners: Mapping[nn.Parameter, Sequence[tuple[nn.Module, str]]],
        *,
        index: int,
        group: dist.ProcessGroup,
    ) -> None:
        """`owners` are the places of each in modules; `index` is this rank's in the group. Cut at the ends of fixed
        blocks (training.arithmetic.norm), so that norms can be taken of shards."""
        self.parameters = parameters
        self.index = index
        self._group = group
        num_shards = group.size()
        self.shards: tuple[Shard, ...] = shards([p.numel() for p in parameters], num_shards)
        most = max(sum(piece.num_elements for piece in shard) for shard in self.shards)
        self.shard_elements = -(-most // 8) * 8 or 8
        """Room for the largest; what is left over in others is nothing."""
        self._flat = self.empty()
        self._put(self._flat, [p.detach().reshape(-1) for p in parameters])
        self.own = self._flat.view(num_shards, -1)[index].clone()
        """This rank's shard, which the optimizer changes."""
        self._cut = [p for number, p in enumerate(parameters) if not self._is_in_one_shard(number)]
        self._place_parameters()
        self._memory = [tensor.untyped_storage() for tensor in (self._flat, *(p.data for p in self._cut))]
        self._sizes = [memory.nbytes() for memory in self._memory]
        self._stand_ins = [nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in parameters]
        self._owners = [owners[p] for p in parameters]
        self.is_whole = True

    @property
    def own_shard(self) -> Shard:
        return self.shards[self.index]

    def own_pieces(self, vector: Tensor) -> list[Tensor]:
        """Of a vector like `own`: each piece's elements, not copied."""
        sizes = [piece.num_elements for piece in self.own_shard]
        return list(torch.split(vector[: sum(sizes)], sizes)) if sizes else []

    def empty(self) -> Tensor:
        """Room for all shards, one after another."""
        device = self.parameters[0].device
        return torch.empty(len(self.shards) * self.shard_elements, device=device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Of such room: each piece of each shard."""
        return [flat[start : start + size] for start, size in self._extents()]

    def slices(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors like the parameters, flat: the same pieces."""
        return [tensors[piece.parameter][piece.start : piece.stop] for shard in self.shards for piece in shard]

    def gathered(self, own: Tensor) -> list[Tensor]:
        """From every rank's vector like `own` (weights, or what the optimizer keeps of them): tensors like the
        parameters. Collective."""
        flat = self.empty()
        dist.all_gather_single(flat, own, group=self._group)
        found = [torch.empty(p.shape, device=flat.device) for p in self.parameters]
        torch._foreach_copy_(self.slices([one.view(-1) for one in found]), self.views(flat))
        return found

    def lend(self) -> dict[nn.Parameter, nn.Parameter]:
        """Put copies that are whole into the model, until it is freed; which is in the place of which. Collective."""
        copies = [nn.Parameter(whole) for whole in self.gathered(self.own)]
        self._hang(copies)
        return dict(zip(self.parameters, copies, strict=True))

    def gather(self) -> None:
        """Have the whole parameters. Collective, unless they are whole."""
        if self.is_whole:
            return
        self.is_whole = True
        for memory, size in zip(self._memory, self._sizes, strict=True):
            memory.resize_(size)
        dist.all_gather_single(self._flat, self.own, group=self._group)
        if self._cut:
            torch._foreach_copy_(self._cut_slices, self._cut_views)
        self._hang(self.parameters)

    def free(self) -> None:
        """Keep the shard alone. Whoever reads a parameter then finds one without elements, which is an error."""
        self.is_whole = False
        for memory in self._memory:
            memory.resize_(0)
        self._hang(self._stand_ins)

    def _hang(self, tensors: Sequence[nn.Parameter]) -> None:
        for places, tensor in zip(self._owners, tensors, strict=True):
            for module, key in places:
                module._parameters[key] = tensor

    def _extents(self) -> Iterator[tuple[int, int]]:
        for number, shard in enumerate(self.shards):
            start = number * self.shard_elements
            for piece in shard:
                yield start, piece.num_elements
                start += piece.num_elements

    def _put(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.views(flat), self.slices(tensors))

    def _is_in_one_shard(self, number: int) -> bool:
        return sum(piece.parameter == number for shard in self.shards for piece in shard) == 1

    def _place_parameters(self) -> None:
        """Those that are in one shard lie where shards are gathered; the others have places of their own."""
        pieces = [piece for shard in self.shards for piece in shard]
        cut = set(self._cut)
        inside: list[tuple[Tensor, Tensor]] = []
        for piece, view in zip(pieces, self.views(self._flat), strict=True):
            parameter = self.parameters[piece.parameter]
            if parameter in cut:
                if piece.start == 0:
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
                inside.append((parameter.data.view(-1)[piece.start : piece.stop], view))
            else:
                parameter.data = view.view(parameter.shape)
        self._cut_slices = [own for own, _ in inside]
        self._cut_views = [view for _, view in inside]


def units_of(
    module: nn.Module, blocks: Sequence[nn.Module], *, index: int, group: dist.ProcessGroup
) -> tuple[Unit | None, dict[nn.Module, Unit]]:
    """One of all trained parameters that are in no block, or in more than one place; and one of each block's others."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.requires_grad:
                owners.setdefault(parameter, []).append((owner, key))
    of_blocks = {
        block: [p for p in dict.fromkeys(block.parameters()) if len(owners.get(p, ())) == 1] for block in blocks
    }
    inside = {p for parameters in of_blocks.values() for p in parameters}
    outside = [p for p in owners if p not in inside]
    maybe_outside = Unit(outside, owners, index=index, group=group) if outside else None
    return maybe_outside, {b: Unit(ps, owners, index=index, group=group) for b, ps in of_blocks.items() if ps}
