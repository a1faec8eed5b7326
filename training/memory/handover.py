"""What a rank leaves in memory when its group ends, and how the next group takes it up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from training import tensorfile
from training.arithmetic.collectives import of_all_ranks
from training.checkpoints.snapshot import Image
from training.checkpoints.state import TrainState
from training.control import Order
from training.memory.live import Live, Pieces, live
from training.memory.slots import (
    Header,
    Held,
    Slots,
    file_of,
    journal_bytes,
    progress_of,
    reaches_back_to,
)
from training.memory.transfer import give, take
from training.runs.events import Entry
from training.runs.figures import Figures

LOCK_SECONDS = 1.0
"""After which a rank that is stuck in the midst of an update leaves nothing."""
log = logging.getLogger(__name__)


class GroupOver(Exception):
    """This rank is in no group any more, and its state is that of its last finished step."""


class GroupEnded(GroupOver):
    """All ranks stopped after the same step, because an agent wanted it."""


class GroupLost(GroupOver):
    """Another rank is gone, and the step that this one was in will not be finished."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the group goes on with."""

    step: int
    take: Callable[[TrainState], Sequence[Entry]]
    """Makes this state the one that was found, and returns its journal. The same bytes on all ranks, and a journal that
    tells as much: those of the lowest of the farthest ranks. Collective. Raises `InfrastructureError` if they did not
    arrive whole: then the state is none."""
    is_here: bool
    """This rank's tensors hold it."""


class Servers(Protocol):
    """What else there is in a process, and goes with it unless it is left in memory: training.servers.colocated has
    the real ones."""

    def leave(self) -> Sequence[memoryview]:
        """Bytes for another process's `take_up`. Nothing changes after that."""
        ...

    def num_left_bytes(self) -> int:
        """About."""
        ...

    def take_up(self, left: memoryview) -> None: ...


class Handover:
    """Keeps the way from one group of ranks to the next, for one process, which may be in both.

    Replicated state changes only inside `update`, once per step: at any other moment it is that of the last finished
    step, seen from any thread, whatever the training thread waits for.
    """

    def __init__(self, slots: Slots | None = None, *, run_key: str = "", generation: int = 0) -> None:
        """Without `slots` nothing is left, and nothing found."""
        self._maybe_slots = slots
        self._run_key = run_key
        self._generation = generation
        self._maybe_state: Callable[[], tuple[int, Mapping[str, Tensor]]] | None = None
        self._lock = threading.Lock()
        self._leaving = threading.Lock()
        self._maybe_servers: Servers | None = None
        self._has_tried = self._has_left_servers = False
        self._maybe_live: Live | None = None
        self._is_whole = True
        self.wants_regroup = False
        """The agent wants this group to end after the step that it is in; all ranks agree on which that is."""
        self.wants_checkpoint = False
        """Likewise, with a checkpoint before."""
        self.maybe_must_end_at: float | None = None
        """By time.monotonic(): the agent waits for that checkpoint no longer."""
        self.is_waiting = False
        """The training thread waits for other ranks."""
        self.waited_seconds = 0.0
        """All in all."""
        self.figures = Figures()
        """Of this rank in the newest group that it trained in."""
        self.journal: list[Entry] = []
        self.step = 0
        """The last finished one."""
        self._maybe_copies_until: int | None = None
        """Copies that are newer are in vain, once this group makes some."""

    def begin_group(self) -> None:
        """What was wanted of the group before is not wanted of this one. To be called by whoever takes orders."""
        self.wants_regroup = self.wants_checkpoint = self.is_waiting = False
        self.maybe_must_end_at = None

    def keep(
        self,
        state: Callable[[], tuple[int, Mapping[str, Tensor]]],
        journal: Sequence[Entry] = (),
        *,
        servers: Servers | None = None,
    ) -> None:
        """From now on `leave` finds the last finished step and its tensors there, and what was found counts no more."""
        with self._leaving:
            self._maybe_state = state
            self._maybe_servers = servers
            self.journal = list(journal)
            self._has_tried = False
            self._maybe_live = None
            if self._maybe_slots is not None:
                self._maybe_slots.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For other ranks, or for the store: nobody is hung who does. It stays so after an error, until the end."""
        if self.is_waiting:
            yield
            return
        started = time.monotonic()
        self.is_waiting = True
        yield
        self.is_waiting = False
        self.waited_seconds += time.monotonic() - started

    @contextmanager
    def update(self) -> Iterator[None]:
        """From one finished step to the next. After an error in the midst of it, nothing is left."""
        with self._lock:
            self._is_whole = False
            yield
            self._is_whole = True

    @contextmanager
    def standstill(self) -> Iterator[None]:
        """Nobody copies the state meanwhile: to be entered before buffers change that no copy has been made of."""
        with self._lock:
            yield

    def take_order(self, order: Order) -> None:
        """What ends this group after a step, together with all ranks."""
        if order.do == "preempt":
            self.maybe_must_end_at = time.monotonic() + order.seconds
        self.wants_regroup |= order.do == "regroup"
        self.wants_checkpoint |= order.do == "preempt"

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """A finished step, as rank 0 tells of it."""
        self.step = step
        self.journal.append(Entry(time=time.time(), step=step, values=dict(values)))

    def complete(self, **values: Any) -> None:
        """What is known of the last step only after it."""
        with self._lock:
            last = self.journal[-1]
            self.journal[-1] = replace(last, values={**last.values, **values})

    def forget(self, step: int) -> None:
        """A checkpoint holds this step: what was told of it and of those before is on the store."""
        if self.journal and self.journal[0].step <= step:
            self.journal = [entry for entry in self.journal if entry.step > step]

    def reserve(self) -> None:
        """Have memory ready for what `leave` will write, which says what is wrong if there is none."""
        slots, state = self._maybe_slots, self._maybe_state
        if slots is not None and state is not None:
            with suppress(Exception):
                with self._lock:
                    num_bytes = sum(tensor.nbytes for tensor in state()[1].values())
                slots.reserve(num_bytes)
                if self._maybe_servers is not None:
                    slots.of_servers.reserve(self._maybe_servers.num_left_bytes())

    @property
    def has_kept(self) -> bool:
        """Whether this process was in a group before."""
        return self._maybe_state is not None

    def stay(self) -> None:
        """This process will be in the next group too: what it holds need not be copied, but others may ask for it."""
        assert self._maybe_state is not None, "who was in a group has kept a state"
        step, tensors = self._maybe_state()
        self._maybe_state = lambda: (step, tensors)  # and nothing else of the group before
        self._maybe_live = live(
            run_key=self._run_key, generation=self._generation, step=step, tensors=tensors, entries=self.journal
        )

    def leave(self) -> None:
        """Write the last finished step into a slot, on whatever thread; nothing if an update does not end; and what
        servers have. Who comes while another thread writes waits: the process must end after this. Raises nothing, as
        there is more to say.
        """
        with self._leaving:
            if self._maybe_slots is not None and self._maybe_state is not None:
                self._leave_state(self._maybe_slots, self._maybe_state)
                if self._maybe_servers is not None:
                    self._leave_servers(self._maybe_slots.of_servers, self._maybe_servers)

    def _leave_state(self, slots: Slots, state: Callable[[], tuple[int, Mapping[str, Tensor]]]) -> None:
        if self._has_tried or not self._lock.acquire(timeout=LOCK_SECONDS):
            return
        self._has_tried = True  # once is enough, and the next worker may read by now
        try:
            if self._is_whole:
                step, tensors = state()
                _write(slots, self._run_key, self._generation, step, tensors, journal_bytes(self.journal))
        except Exception:  # what no checkpoint can hold, either; or there is no memory for it
            log.exception("nothing is left in memory of step %d", self.step)
        finally:
            self._lock.release()

    def _leave_servers(self, slots: Slots, servers: Servers) -> None:
        """Whatever became of the state: other ranks may have one that goes with these."""
        if self._has_left_servers:
            return
        self._has_left_servers = True
        try:
            _write_servers(slots, self._run_key, self._generation, Pieces(servers.leave()))
        except Exception:  # there is no memory for it
            log.exception("nothing is left in memory of servers")

    def put_copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Of the last finished step, of parts of the state (training.memory.copies), in the place of the older one of
        two."""
        if self._maybe_slots is not None:
            if self._maybe_copies_until is not None:
                self._maybe_slots.clear_after(self._maybe_copies_until)
                self._maybe_copies_until = None
            try:
                _write(
                    self._maybe_slots, self._run_key, self._generation, self.step, tensors, journal_bytes(self.journal)
                )
            except OSError:  # there is no memory for it
                log.exception("there is no copy in memory of step %d", self.step)

    def copies(self, *, since: int) -> list[Held]:
        """Those that are not older than step `since`, and whose journal reaches back to it, the newest first."""
        if self._maybe_slots is None:
            return []
        found = self._maybe_slots.whole(self._run_key, self._generation)
        return [held for held in found if held.step >= max(since, 1) and reaches_back_to(held, since)]

    def begin_at(self, step: int, journal: Sequence[Entry] = ()) -> None:
        """Where a group begins that keeps copies in memory alone. Newer ones stay until its own first: if it ends
        before, as one may that began at a checkpoint, the next group may be one whose ranks have all parts."""
        self.step = self._maybe_copies_until = step
        self.journal = list(journal)

    def find_servers(self, servers: Servers) -> None:
        """Have them take up what was left of them in the place of this process."""
        if self._maybe_slots is not None:
            maybe_left = self._maybe_slots.of_servers.newest(self._run_key, self._generation)
            if maybe_left is not None:
                servers.take_up(maybe_left.body)

    def find(self, *, since: int) -> Found | None:
        """The newest state that any rank has in memory, if it is not older than step `since` and its journal reaches
        back to it. Collective.
        """
        own: Held | None = self._maybe_live
        if own is None and self._maybe_slots is not None:
            own = self._maybe_slots.newest(self._run_key, self._generation)
        if own is not None and (own.step < max(since, 1) or not reaches_back_to(own, since)):
            own = None
        mine = [-1, 0] if own is None else [progress_of(own), own.fingerprint]
        found: list[list[int]] = of_all_ranks(torch.tensor(mine)).tolist()
        best = max(found, key=lambda numbers: numbers[0])
        if best[0] < 0:
            return None
        is_here = self._maybe_live is not None and mine == best
        return Found(
            step=best[0] // 2,
            take=lambda state: _hand_out(own, state, [same == best for same in found], is_here=is_here),
            is_here=is_here,
        )


def _hand_out(maybe_held: Held | None, state: TrainState, has_it: Sequence[bool], *, is_here: bool) -> Sequence[Entry]:
    """What the ranks have that have it. Each gives it to one that lacks it, and so on in rounds, as in a binomial tree.
    Collective.
    """
    givers = [rank for rank, has in enumerate(has_it) if has]
    takers = [rank for rank, has in enumerate(has_it) if not has]
    own = dist.get_rank() if takers else 0
    maybe_tensors = None
    while takers:
        pairs = list(zip(givers, takers, strict=False))
        for giver, taker in pairs:
            if own == giver:
                assert maybe_held is not None
                give(maybe_held, taker)
            elif own == taker:
                maybe_held, maybe_tensors = take(giver, state.places)
        givers += takers[: len(pairs)]
        takers = takers[len(pairs) :]
    assert maybe_held is not None
    if maybe_tensors is not None:
        state.load(maybe_tensors, step=maybe_held.step, may_keep=True)
    elif not is_here:
        state.load(tensorfile.tensors(file_of(maybe_held)), step=maybe_held.step)
    return maybe_held.entries


def _write(
    slots: Slots, run_key: str, generation: int, step: int, tensors: Mapping[str, Tensor], journal: bytes
) -> None:
    image = Image(tensors)
    header = Header(
        run_key=run_key,
        generation=generation,
        step=step,
        num_file_bytes=image.num_bytes,
        num_bytes=image.num_bytes + len(journal),
    )

    def fill(body: memoryview) -> None:
        image.write(body[: image.num_bytes])
        body[image.num_bytes :] = journal

    slots.write(header, fill)


def _write_servers(slots: Slots, run_key: str, generation: int, pieces: Pieces) -> None:
    num_bytes = pieces.num_bytes
    header = Header(run_key=run_key, generation=generation, step=0, num_file_bytes=num_bytes, num_bytes=num_bytes)
    slots.write(header, pieces.put)
