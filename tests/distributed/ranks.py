"""Real ranks for tests: processes that are spawned once, and meet in gloo groups of any size up to theirs."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT_SECONDS = 120.0


class RankPool:
    """`num_ranks` processes. A function given to `run` must be importable: spawned processes share no memory."""

    def __init__(self, num_ranks: int, folder: Path) -> None:
        self._folder = folder
        self._num_runs = 0
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(num_ranks):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
        """What `function(rank, world_size, *arguments)` returned on each rank of a new group."""
        self._num_runs += 1
        rendezvous = str(self._folder / f"rendezvous-{self._num_runs}")
        for rank in range(world_size):
            self._pipes[rank].send((function, rank, world_size, rendezvous, arguments))
        return [self._result(rank) for rank in range(world_size)]

    def _result(self, rank: int) -> Any:
        if not self._pipes[rank].poll(2 * TIMEOUT_SECONDS):
            raise AssertionError(f"rank {rank} does not answer")
        maybe_error, result = self._pipes[rank].recv()
        assert maybe_error is None, f"rank {rank} failed:\n{maybe_error}"
        return result

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.close()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe: Connection) -> None:
    """One rank: does what it is told until its test process is gone."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with suppress(EOFError, BrokenPipeError):
        while True:
            function, rank, world_size, rendezvous, arguments = pipe.recv()
            try:
                pipe.send((None, _in_group(function, rank, world_size, rendezvous, arguments)))
            except Exception:
                pipe.send((traceback.format_exc(), None))
    os._exit(0)  # torch's own goodbye takes seconds


def _in_group(
    function: Callable[..., Any], rank: int, world_size: int, rendezvous: str, arguments: tuple[Any, ...]
) -> Any:
    import torch.distributed as dist

    store = dist.FileStore(rendezvous, world_size)  # type: ignore[attr-defined]  # public, but not listed
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        return function(rank, world_size, *arguments)
    finally:
        dist.destroy_process_group()
