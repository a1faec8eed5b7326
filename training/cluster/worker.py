"""One rank: forked by its agent's zygote, told all by one order, dead when either of them dies."""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from training.cluster.attendance import Attendance
from training.control import EXIT_STOPPED, Call, Channel, Note, Order
from training.documents import parse
from training.errors import OutOfMemoryError, UnbrokenError
from training.memory.slots import Slots
from training.runs.failures import ReaderDiedError
from training.runs.job import Job

if TYPE_CHECKING:
    from training.rank import Kit

BEAT_SECONDS = 0.25
BEATS_PER_FIGURES = 4
PATIENCE_SECONDS = 0.2
"""How long a worker that is told to stop may take to leave its group and stay, before it ends instead."""
PATIENCE_WITH_SERVERS_SECONDS = 1.0
"""If servers would end with it, and more has to be written and read. Its agent waits for 3."""


@dataclass(frozen=True, kw_only=True)
class WorkerOrder:
    """What the agent tells a worker as it begins. The groups that it belongs to, it is called to."""

    job: dict[str, Any]
    local_rank: int
    may_stay: bool = False
    """Between two groups, if the training can."""
    is_spare: bool = False
    """It waits until another one dies, and has time to make ready for that."""
    control_fd: int = -1
    """This worker's end of the socket between it and its agent (training.control)."""
    slot_fd_0: int = -1
    slot_fd_1: int = -1
    servers_fd: int = -1
    """Where state is left and found (training.memory.slots)."""


def run(document: dict[str, Any]) -> int:
    """Train as the order says. Returns the exit code, with which the caller ends this process at once."""
    return _Worker(parse(WorkerOrder, document)).run()


class _Worker:
    """One thread trains, one obeys, one gives signs of life."""

    def __init__(self, order: WorkerOrder) -> None:
        from training.memory.handover import Handover

        self._order = order
        self._channel = Channel(socket.socket(fileno=order.control_fd))
        self._attendance = Attendance()
        self._maybe_kit: Kit | None = None
        slots = Slots([order.slot_fd_0, order.slot_fd_1, order.servers_fd])
        self._handover = Handover(slots, run_key=order.job["key"], generation=order.job["generation"])

    def run(self) -> int:
        from training.memory.handover import GroupEnded

        for target in (self._obey, self._beat):
            threading.Thread(target=target, name="control", daemon=True).start()
        try:
            return self._serve()
        except Exception as error:  # the agent decides what it means; no more collectives after an error
            self._handover.leave()
            if isinstance(error, GroupEnded):
                return EXIT_STOPPED
            self._report(error)
            return error.exit_code if isinstance(error, UnbrokenError) else 1

    def _serve(self) -> int:
        """Train in one group after another, until the run is finished."""
        from training.memory.handover import GroupOver
        from training.rank import prepare, train

        kit = prepare(Job.from_json(self._order.job), local_rank=self._order.local_rank)
        if self._order.is_spare and kit.maybe_state is not None:
            kit.maybe_state.make_room(kit.recipe)
        may_stay = self._order.may_stay and kit.may_stay
        self._maybe_kit = kit if may_stay else None
        while True:
            call, maybe_listener = self._attendance.next_call()
            try:
                rendezvous = _rendezvous(call, maybe_listener)
                train(kit, call.seat, call.record, rendezvous, self._handover, self._channel.send)
            except GroupOver as over:
                if not may_stay:
                    raise
                self._attendance.leave()
                self._channel.send(_note("left", over, self._handover.step))
            else:
                return 0
            self._handover.stay()

    def _obey(self) -> None:
        """What the agent says, until it is gone: then this process goes too."""
        try:
            with suppress(EOFError, OSError):
                while True:
                    for order in self._channel.orders():
                        self._do(order)
        finally:
            os._exit(1)

    def _do(self, order: Order) -> None:
        if order.maybe_call is not None:
            maybe_listener = self._channel.descriptors.popleft() if order.maybe_call.is_host else None
            self._handover.begin_group()
            self._attendance.call(order.maybe_call, maybe_listener)
        elif order.do == "stop":
            self._stop()
        else:
            self._handover.take_order(order)

    def _stop(self) -> None:
        """Have the training thread leave its group; or end this process, once what it holds is left in memory."""
        if self._maybe_kit is not None:
            self._maybe_kit.cut()
        if self._attendance.must_end(self._patience_seconds):
            self._handover.leave()
            os._exit(EXIT_STOPPED)

    @property
    def _patience_seconds(self) -> float:
        if self._maybe_kit is None:
            return 0.0
        return PATIENCE_SECONDS if self._maybe_kit.maybe_servers is None else PATIENCE_WITH_SERVERS_SECONDS

    def _beat(self) -> None:
        """Tell the agent that this process lives, and whether it waits for others."""
        with suppress(OSError):
            for number in itertools.count():
                if self._attendance.is_in:  # else nobody listens
                    handover = self._handover
                    figures = None if number % BEATS_PER_FIGURES else handover.figures.numbers()
                    beat = Note(event="beat", step=handover.step, is_waiting=handover.is_waiting, figures=figures)
                    self._channel.send(beat)
                time.sleep(BEAT_SECONDS)

    def _report(self, error: Exception) -> None:
        note = _note("failed", error, self._handover.step)
        if note.class_name == "Exception":
            traceback.print_exc()
        with suppress(OSError):
            self._channel.send(note)
        sys.stdout.flush()
        sys.stderr.flush()


def _note(event: Literal["left", "failed"], error: Exception, step: int) -> Note:
    return Note(
        event=event,
        class_name=_class_name(error),
        message=str(error) or repr(error),
        step=step,
        records=getattr(error, "records", ()),
    )


def _class_name(error: Exception) -> str:
    """The class that says who must act; errors of the group's collectives say only that a peer is gone."""
    if isinstance(error, UnbrokenError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == UnbrokenError.__module__)
    if isinstance(error, ReaderDiedError):
        return error.class_name
    from training.arithmetic.collectives import is_of_lost_peer
    from training.arithmetic.objective import is_lack_of_memory
    from training.memory.handover import GroupEnded, GroupLost

    if isinstance(error, GroupEnded):
        return ""  # nobody's fault
    if is_lack_of_memory(error):
        return OutOfMemoryError.__name__
    return "PeerLost" if isinstance(error, GroupLost) or is_of_lost_peer(error) else "Exception"


def _rendezvous(call: Call, maybe_listener: int | None) -> Any:
    """The group's own store, on the one socket that its first node's agent bound; and in it a corner of its token's
    own, as an agent that never learnt that it was named offers the same socket again."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, but not listed

    store = TCPStore(
        call.store_address,
        call.store_port,
        world_size=call.seat.world_size,
        is_master=call.is_host,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
        master_listen_fd=maybe_listener,
    )
    return PrefixStore(str(call.seat.token), store)
