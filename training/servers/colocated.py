"""Parameter servers in the ranks' own processes: what a rank has of them, from one group to the next."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training.arithmetic.collectives import texts_of_all_ranks
from training.arithmetic.objective import recipe_errors
from training.arithmetic.reduce import Subtree
from training.arithmetic.sparse import tables_of
from training.checkpoints.state import TrainState
from training.config import Preset
from training.errors import UserError
from training.recipe import Recipe, learning_rate_scale
from training.servers.arithmetic import Decision, Report, TensorState, decide, put, require_elementwise
from training.servers.endpoints import Begun, PrimaryLost, Remote
from training.servers.hosted import Hosted, leave, left_copies
from training.servers.layout import Shard, shards
from training.servers.mesh import Address, Mesh
from training.servers.placement import may_go_on, num_computing, place
from training.servers.protocol import Assignment, Copy
from training.servers.replica import Replica
from training.servers.rows import Part
from training.servers.stillness import require_still

MAX_COPIES = 16
"""Of the parameters in a message: they, and what the optimizer keeps of each. A push has at most 2·log2(V) sums."""
MAX_OTHER_BYTES = 1 << 28


class Colocated:
    """Shards' replicas in this process, and its way to all shards. They outlast a group if the process does.

    A group goes on with what its ranks hold of all shards, or begins all of them anew from a whole state.
    """

    def __init__(self, recipe: Recipe, preset: Preset, *, address: str, secret: str) -> None:
        """`address` is this node's, for the other ranks; all prove that they know `secret`."""
        self._recipe = recipe
        self._preset = preset
        self._address = address
        self._secret = secret
        self._here: dict[str, Mesh] = {}
        self._hosted: dict[int, Hosted] = {}
        self._left: Mapping[int, Copy] = {}
        """By the process that was in the place of this one, until a group begins."""
        self._placement: tuple[tuple[int, ...], ...] = ()
        self._num_computing = 0
        """Ranks, the first ones."""
        self._is_new = True
        self._maybe_remote: Remote | None = None
        self._maybe_parameters: Sequence[Tensor] | None = None
        self._shards: tuple[Shard, ...] = ()
        self._step = 0
        """In hand."""
        self._over_token = 0
        """Of the last group that was given up."""
        self._maybe_error: Exception | None = None
        """That ended a replica here: this process cannot go on."""
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
            _require_contiguous(state.trained)
            _require_divisible(state.optimizer)
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
        with recipe_errors("optimizer()"):
            optimizer = self._recipe.optimizer(state.model)
        optimizer.state.update(state.optimizer.state)
        tensors = TensorState(optimizer, list(state.trained.values()), self._shards[shard])
        tensors.step = state.step
        mesh = self._mesh(f"server {shard}")
        replica = Replica(mesh.name, tensors, num_virtual_workers=self._preset.train.virtual_workers)
        if self._is_new:
            replica.fill()
        elif shard in self._left:
            replica.take(self._left[shard])
        return Hosted(mesh, replica, tensors, self._hear_of_trouble)

    def _mesh(self, what: str) -> Mesh:
        num_bytes = sum(parameter.nbytes for parameter in self._parameters)
        return Mesh(
            f"{what} {uuid.uuid4().hex}",
            secret=self._secret,
            address=self._address,
            here=self._here,
            max_bytes=(MAX_COPIES + 2 * self._preset.train.virtual_workers.bit_length()) * num_bytes + MAX_OTHER_BYTES,
        )

    def _meet(self, token: int) -> None:
        """Tell all ranks where what is here listens, and begin with what they tell."""
        own = {
            "worker": [self._worker.name, *self._worker.address],
            "servers": {shard: [hosted.mesh.name, *hosted.mesh.address] for shard, hosted in self._hosted.items()},
        }
        told = [json.loads(text) for text in texts_of_all_ranks(json.dumps(own))]
        places: dict[str, Address] = {}
        for name, host, port in (entry for one in told for entry in (one["worker"], *one["servers"].values())):
            places[name] = (host, port)
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

    @cached_property
    def _worker(self) -> Mesh:
        return self._mesh("worker")

    @property
    def _parameters(self) -> Sequence[Tensor]:
        assert self._maybe_parameters is not None, "a group has begun"
        return self._maybe_parameters

    @property
    def _remote(self) -> Remote:
        assert self._maybe_remote is not None, "a group has begun"
        return self._maybe_remote

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

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """What ended a replica here is raised in the place of `PrimaryLost`, which it led to."""
        try:
            yield
        except PrimaryLost:
            if self._maybe_error is None:
                raise
            with recipe_errors(f"step {self._step}, on a server"):
                raise self._maybe_error from None

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

    def optimizer_entries(self) -> dict[Tensor, dict[str, Any]]:
        """What the shards keep of each parameter, as one optimizer would. Raises `PrimaryLost`."""
        parts: dict[Tensor, dict[str, list[Any]]] = {}
        with self._own_errors():
            snapshots = self._remote.pull_all()
        for shard, snapshot in zip(self._shards, snapshots, strict=True):
            for number, piece in enumerate(shard):
                entries = parts.setdefault(self._parameters[piece.parameter], {})
                for key, value in snapshot["optimizer"][number].items():
                    entries.setdefault(key, []).append(value)
        return {
            parameter: {key: _joined(values, parameter) for key, values in entries.items()}
            for parameter, entries in parts.items()
        }

    def give_up(self) -> None:
        """May be called by another thread: whoever waits for an answer of this group gets none."""
        if self._maybe_remote is not None:
            self._over_token = self._maybe_remote.token
            self._maybe_remote.give_up()

    def _hear_of_trouble(self, token: int, maybe_error: Exception | None) -> None:
        """From a replica here, of the group of that token."""
        self._maybe_error = self._maybe_error or maybe_error
        if self._maybe_remote is not None and self._maybe_remote.token == token:
            self.give_up()

    def require_group(self) -> None:
        """Raises `PrimaryLost` if it is known that this group is over: who computes hears of it so."""
        if self._over_token == self._remote.token:
            with self._own_errors():
                raise PrimaryLost("the group is over")


class _NotFiniteError(Exception):
    """Nothing to be applied."""

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.decision = decision


def _joined(values: Sequence[Any], parameter: Tensor) -> Any:
    """Of an entry of one parameter's pieces: vectors are cut, all else is the same in each."""
    first = values[0]
    if isinstance(first, Tensor) and first.dim() == 1 and sum(map(len, values)) == parameter.numel():
        return torch.cat(list(values)).view(parameter.shape)
    return first


def _require_contiguous(parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_contiguous():
            raise UserError(
                f"{name} is not contiguous: parameter servers need elements in their order; clone it in model()"
            )


def _require_divisible(optimizer: Optimizer) -> None:
    """Raises `UserError` if an optimizer of that kind does not treat each element by itself."""
    kind = type(optimizer)
    taken = signature(kind).parameters  # AdamW has more defaults than it takes
    settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
    try:
        require_elementwise(lambda module: kind(module.parameters(), **settings))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"parameter servers need an optimizer that treats each element by itself, and the recipe's {kind.__name__}"
            f" could not be tried for that ({error}): use train.strategy = 'all_reduce'"
        ) from error
