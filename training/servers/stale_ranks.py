"""Bounded staleness among real ranks: shards in their processes, each of them once, and a rank's way to all of them.

A group begins from a whole state. Nothing of it outlasts the group but what a checkpoint has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from training.checkpoints.state import TrainState
from training.servers.arithmetic import Decision, part_of, put
from training.servers.attached import Attached, require_contiguous, require_divisible
from training.servers.endpoints import Begun, Remote, Server
from training.servers.layout import shards
from training.servers.mesh import Address, Mesh
from training.servers.stale_protocol import Places
from training.servers.stale_state import Contribution, Reading, StaleState, history_of
from training.servers.staleness import StaleShard, StaleWorker


class StaleRemote(Remote):
    """All shards, as a worker sees them that may be ahead of others."""

    def __init__(
        self,
        mesh: Mesh,
        *,
        token: int,
        primaries: Sequence[str],
        places: Mapping[str, Address],
        patience_seconds: float,
    ) -> None:
        super().__init__(
            mesh,
            token=token,
            primaries=primaries,
            places=places,
            decide=_decides_nothing,
            patience_seconds=patience_seconds,
        )
        self._worker = StaleWorker(token=token, shards=primaries)
        self._speakers.append(self._worker)

    def join(self) -> int:
        """The step that this worker's place has finished."""
        self._mesh.send(self._worker.join())
        self._wait()
        return self._worker.clock

    def push_all(
        self, updates: Sequence[Contribution], *, is_barrier: bool, wants_barrier: bool
    ) -> tuple[list[Reading], int]:
        """What the next step adds to each shard. Returns what there is for the step after it, once that is fresh
        enough (at a barrier, the same for all), and a step at which all are to meet, or 0."""
        self._mesh.send(self._worker.push(updates, is_barrier=is_barrier, wants_barrier=wants_barrier))
        self._wait()
        return self._worker.values, self._worker.barrier


def _decides_nothing(reports: Sequence[Any]) -> NoReturn:
    raise NotImplementedError("each worker steps for itself")


class StaleServers(Attached):
    """Of a rank that makes its own updates, and may be `train.staleness` steps ahead of the slowest. For one group."""

    def begin(self, state: TrainState, *, token: int, rank: int, world_size: int) -> None:
        """All shards begin with `state` and its optimizer's part, which it leaves. Collective.

        Raises `UserError` if the optimizer or a parameter cannot be cut.
        """
        self._maybe_parameters = list(state.trained.values())
        self._shards = shards([parameter.numel() for parameter in self._parameters], self._preset.launch.servers)
        require_contiguous(state.trained)
        require_divisible(state.optimizer)
        mine = range(rank, self._preset.launch.servers, world_size)
        served = {shard: self._serve(shard, state, token=token, num_places=world_size) for shard in mine}
        state.optimizer.state.clear()
        self._meet(served, token)
        step = self._stale_remote.join()
        assert step == state.step, f"the servers are at step {step}"

    def _serve(self, shard: int, state: TrainState, *, token: int, num_places: int) -> Server:
        tensors = StaleState(
            self._tensors(shard, state), num_places=num_places, step=state.step, note=history_of(shard, token)
        )
        bound = self._preset.train.staleness
        server = StaleShard(tensors, num_places=num_places, bound=bound, clock=state.step)
        return Server(self._mesh(f"server {shard}"), server, self._hear_of_trouble)

    def _meet(self, served: Mapping[int, Server], token: int) -> None:
        """Begin with what all ranks tell."""
        told, places = self._introduce(served)
        servers = {int(shard): name for one in told for shard, (name, *_) in one["servers"].items()}
        workers = Places(token=token, workers=tuple(one["worker"][0] for one in told))
        launch, train = self._preset.launch, self._preset.train
        self._maybe_remote = StaleRemote(
            self._worker,
            token=token,
            primaries=[servers[shard] for shard in range(launch.servers)],
            places=places,
            patience_seconds=launch.collective_timeout_seconds * (1 + train.staleness),  # so many steps are waited for
        )
        for one in served.values():
            one.begin(Begun(assignment=workers, places=places))

    @property
    def _stale_remote(self) -> StaleRemote:
        assert isinstance(self._remote, StaleRemote)
        return self._remote

    @torch.no_grad()
    def step(
        self,
        step: int,
        gradients: Sequence[Tensor],
        decision: Decision,
        *,
        is_barrier: bool,
        wants_barrier: bool = False,
    ) -> int:
        """Give this rank's step of that number, and take the parameters for the next one. Returns a step that is a
        barrier because a rank wants one, or 0. Raises `PrimaryLost`."""
        self._step = step
        token = self._remote.token
        numbered = dict(enumerate(gradients))
        updates = [
            Contribution(step=step, token=token, gradients=_dense(part_of(numbered, shard)), decision=decision)
            for shard in self._shards
        ]
        with self._own_errors():
            found, barrier = self._stale_remote.push_all(updates, is_barrier=is_barrier, wants_barrier=wants_barrier)
        for shard, reading in zip(self._shards, found, strict=True):
            put(reading.values, shard, self._parameters)
        return barrier


def _dense(part: Any) -> Tensor:
    assert isinstance(part, Tensor), "gradients are whole"
    return part
