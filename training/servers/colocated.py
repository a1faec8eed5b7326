"""Parameter servers in the ranks' own processes: what a rank has of them, from one group to the next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.reduce import Subtree
from training.arithmetic.sparse import tables_of
from training.checkpoints.state import TrainState
from training.config import Preset
from training.recipe import Recipe, learning_rate_scale
from training.servers.arithmetic import Decision, Report, decide, put
from training.servers.attached import Attached, require_contiguous, require_divisible
from training.servers.endpoints import Begun, Remote
from training.servers.hosted import Hosted, leave, left_copies
from training.servers.layout import Shard, shards
from training.servers.placement import may_go_on, num_computing, place
from training.servers.protocol import Assignment, Copy
from training.servers.replica import Replica
from training.servers.rows import Part
from training.servers.stillness import require_still


class Colocated(Attached):
    """Shards' replicas in this process, and its way to all shards. They outlast a group if the process does.

    A group goes on with what its ranks hold of all shards, or begins all of them anew from a whole state.
    """

    def __init__(self, recipe: Recipe, preset: Preset, *, address: str, secret: str) -> None:
        super().__init__(recipe, preset, address=address, secret=secret)
        self._hosted: dict[int, Hosted] = {}
        self._left: Mapping[int, Copy] = {}
        """By the process that was in the place of this one, until a group begins."""
        self._placement: tuple[tuple[int, ...], ...] = ()
        self._num_computing = 0
        """Ranks, the first ones."""
        self._is_new = True
        self._maybe_answer: tuple[Decision, Sequence[Tensor | Part]] | None = None

    # ---- from one process to the next --------------------------------------------------------------------------------

    def leave(self) -> Sequence[memoryview]:
        """What the replicas here have, for `take_up`. This process must end then: they answer nobody any more."""
        return leave(dict(self._hosted))

    def num_left_bytes(self) -> int:
        """About."""
        return sum(hosted.num_bytes() for hosted in list(self._hosted.values()))

    def take_up(self, left: memoryview) -> None:
        """What the process that was in the place of this one had: a group may go on with it."""
        self._left = left_copies(left)

    def shards_of(self, model: nn.Module) -> tuple[Shard, ...]:
        """Of its parameters that are trained."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tables = set(tables_of(model))
        widths = {number: one.shape[1] for number, one in enumerate(parameters) if one in tables}
        return shards([parameter.numel() for parameter in parameters], self._preset.launch.servers, widths)

    # ---- a group begins ----------------------------------------------------------------------------------------------

    def can_go_on(self, maybe_step: int | None, *, nodes: Sequence[int]) -> bool:
        """Whether the ranks, which have finished that step, can go on with their replicas. If not, all forget what they
        have. Collective."""
        launch = self._preset.launch
        own = {shard: copy.position for shard, copy in self._left.items()}
        own |= {shard: hosted.replica.position for shard, hosted in self._hosted.items()}
        holdings = [
            {int(shard): position for shard, position in json.loads(text).items()}
            for text in texts_of_all_ranks(json.dumps(own))
        ]
        farthest = [max(holding.get(shard, -1) for holding in holdings) for shard in range(launch.servers)]
        is_whole = maybe_step is not None and may_go_on(farthest, maybe_step)
        if not is_whole:
            self._forget()
            holdings = [{} for _ in holdings]
        self._is_new = not is_whole
        self._num_computing = computing = num_computing(nodes, launch.server_nodes)
        hosts = range(computing if launch.server_nodes and computing < len(nodes) else 0, len(nodes))
        self._placement = place(launch.servers, launch.server_replicas, holdings=holdings, nodes=nodes, hosts=hosts)
        return is_whole

    def begin(self, state: TrainState, *, token: int, rank: int) -> None:
        """With what `can_go_on` found, or with `state` and its optimizer's part, which it leaves. Collective.

        Raises `UserError` if the optimizer or a parameter cannot be cut.
        """
        self._maybe_parameters = list(state.trained.values())
        self._shards = self.shards_of(state.model)
        if self._is_new:
            require_contiguous(state.trained)
            require_divisible(state.optimizer)
            require_still(state.optimizer, set(tables_of(state.model)))
        mine = [shard for shard, ranks in enumerate(self._placement) if rank in ranks]
        for shard in self._hosted.keys() - set(mine):
            self._hosted.pop(shard).close()
        for shard in mine:
            if shard not in self._hosted:
                self._hosted[shard] = self._host(shard, state)
        self._left = {}
        state.optimizer.state.clear()
        self._meet(token)

    def _host(self, shard: int, state: TrainState) -> Hosted:
        tensors = self._tensors(shard, state)
        tensors.step = state.step
        mesh = self._mesh(f"server {shard}")
        replica = Replica(mesh.name, tensors, num_virtual_workers=self._preset.train.virtual_workers)
        if self._is_new:
            replica.fill()
        elif shard in self._left:
            replica.take(self._left[shard])
        return Hosted(mesh, replica, tensors, self._hear_of_trouble)

    def _meet(self, token: int) -> None:
        """Begin with what all ranks tell."""
        told, places = self._introduce(self._hosted)
        names = [
            [told[rank]["servers"][str(shard)][0] for rank in ranks] for shard, ranks in enumerate(self._placement)
        ]
        speakers = tuple(one["worker"][0] for one in told[self._num_computing :])
        self._maybe_remote = Remote(
            self._worker,
            token=token,
            primaries=[one[0] for one in names],
            places=places,
            decide=self._decide,
            patience_seconds=self._preset.launch.collective_timeout_seconds,
        )
        for shard, hosted in self._hosted.items():
            primary, *backups = names[shard]
            assignment = Assignment(
                token=token, primary=primary, backups=tuple(backups), speakers=() if shard else speakers
            )
            hosted.begin(Begun(assignment=assignment, places=places))

    def _forget(self) -> None:
        for hosted in self._hosted.values():
            hosted.close()
        self._hosted, self._left = {}, {}

    # ---- a step ------------------------------------------------------------------------------------------------------

    @property
    def _answer(self) -> tuple[Decision, Sequence[Tensor | Part]]:
        assert self._maybe_answer is not None, "a step was decided"
        return self._maybe_answer

    def push(self, step: int, shard: int, parts: Sequence[tuple[Subtree, Any]], maybe_said: Tensor | None) -> None:
        """Give a shard this rank's sums of a step, or what it says if it has none. Never waits."""
        self._step = step  # what is decided may be, before this returns
        self._remote.push(step, shard, parts, maybe_said)

    def finish_step(self) -> Tensor:
        """Once each shard was given its part. Returns the sum of all extras. Raises `PrimaryLost`."""
        self._maybe_answer = None
        try:
            with self._own_errors():
                self._maybe_answer = self._remote.finish()
        except _NotFiniteError as error:  # no shard has applied it, and the trainer says what is wrong
            self._maybe_answer = error.decision, ()
        return self._answer[0].extras

    def _decide(self, reports: Sequence[Report]) -> Decision:
        train = self._preset.train
        scale = learning_rate_scale(self._recipe, self._step - 1, train.steps)
        decision = decide(reports, clip_norm=train.clip_norm, learning_rate_scale=scale)
        if not math.isfinite(decision.grad_norm):
            raise _NotFiniteError(decision)
        return decision

    def clip(self) -> float:
        """The norm of the gradients, before they were clipped."""
        return self._answer[0].grad_norm

    @torch.no_grad()
    def apply(self) -> None:
        """Take the parameters after the step."""
        for shard, values in zip(self._shards, self._answer[1], strict=True):
            put(values, shard, self._parameters)
        self._maybe_answer = None  # its memory is wanted for the next one


class _NotFiniteError(Exception):
    """Nothing to be applied."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision
