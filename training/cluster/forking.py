"""What a zygote does: import all that a worker needs, then fork one for each order of its agent.

A fork copies the calling thread only; what any other thread holds is held for ever in the copy. So this process stays
at one thread, does no tensor operation, and touches no accelerator; if a recipe's import breaks that, the process
begins again without it. It never acts by itself: it ends with its agent, and its workers end with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from training.documents import parse
from training.processes import die_with

MODULE = "training.cluster.zygote"
WORKER_MODULE = "training.cluster.worker"
PRELOADED = ("numpy", "numpy.ma", "encodings.idna", "torch", "torch._dynamo", "training.rank")
"""Imported before the recipe. torch imports `_dynamo` when the first optimizer is made, which takes 0.9 s."""
MAX_MESSAGE_BYTES = 1 << 16
MAX_HANDED = 200
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Sent to a whole process group, they are for the agent to act on: it may want a checkpoint of the workers first."""
DEVICES = ("/dev/nvidia", "/dev/kfd")
log = logging.getLogger(MODULE)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a zygote is told at its start."""

    socket_fd: int
    agent_pid: int
    entry: str
    """`module:function`, which takes an order and returns an exit code."""
    recipe: str | None
    """`module:Class`; None leaves it to the workers to import it."""
    folder: str
    """The preset's, where recipes may lie."""
    children: dict[str, int] = field(default_factory=dict)
    """Pids by the numbers of their orders: of a zygote that began again."""


def document_fd(document: Mapping[str, Any]) -> int:
    """A file in memory that holds a JSON document. The caller closes it."""
    fd = os.memfd_create("order")
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps(document).encode())
    return fd


def read_document(fd: int) -> dict[str, Any]:
    """The inverse of `document_fd`; closes the file."""
    with open(fd, "rb") as file:
        file.seek(0)
        document: dict[str, Any] = json.loads(file.read())
    return document


def unfit() -> str | None:
    """Why a fork of this process might hang or fail; None if nothing speaks against it."""
    names = [_read_name(task) for task in Path("/proc/self/task").iterdir()]
    if len(names) > 1:
        return f"there are {len(names)} threads ({', '.join(names)})"
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            links.append(str(fd.readlink()))
    devices = sorted({link for link in links if link.startswith(DEVICES)})
    if devices:
        return f"an accelerator is in use ({', '.join(devices)})"
    return "SIGCHLD has a handler" if signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL else None


def _read_name(task: Path) -> str:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it ended
        return "?"


class Server:
    """The zygote's one loop: orders come in by the socket, workers' deaths by their pidfds."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._environment, self._folder = dict(os.environ), os.getcwd()
        self._socket = socket.socket(fileno=plan.socket_fd)
        self._socket.set_inheritable(False)
        self._selector = selectors.PollSelector()  # epoll's descriptor would be shared with the workers
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._workers: dict[int, tuple[str, int]] = {}
        for number, pid in plan.children.items():
            self._watch(os.pidfd_open(pid), number, pid)
        self._maybe_digest: str | None = None

    def serve(self) -> None:
        """Until the agent closes its end, or dies."""
        self.preload()
        self._send({"kind": "ready"})
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._socket:
                    self._reap(key.fd)
                elif not self._take_order():
                    return

    def preload(self) -> None:
        """Import what a worker imports. Does not return if the process must begin again, or cannot serve."""
        for name in (self.plan.entry.split(":")[0], *PRELOADED):
            importlib.import_module(name)
        _warm_store()
        _prepare_documents()
        reason = unfit()
        if reason:
            self._send({"kind": "refused", "reason": f"{reason} although nothing but this library was imported"})
            os._exit(1)
        if self.plan.recipe is not None:
            self._preload_recipe(self.plan.recipe)
        gc.collect()
        gc.freeze()  # or the first collection in each worker would copy every page

    def _preload_recipe(self, recipe: str) -> None:
        """Import the recipe; begin again without it if that fails, or leaves more than modules behind."""
        try:
            self._maybe_digest = _imported_digest(recipe, self.plan.folder)
            reason = unfit()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            self._begin_again(replace(self.plan, recipe=None), f"workers import recipe {recipe} themselves: {reason}")

    def _begin_again(self, plan: Plan, reason: str) -> NoReturn:
        """As a new program in the same process: the workers stay its children, and orders stay in the socket."""
        log.warning("%s", reason)
        sys.stdout.flush()
        sys.stderr.flush()
        plan = replace(plan, children=dict(self._workers.values()))
        fd = document_fd(asdict(plan))
        for kept in (fd, plan.socket_fd):
            os.set_inheritable(kept, True)
        os.chdir(self._folder)
        os.execve(sys.executable, [*sys.orig_argv[:-1], str(fd)], self._environment)

    def _take_order(self) -> bool:
        """Fork a worker for the order that waits; False if there is nobody any more to send one."""
        self._require_fit()
        data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE_BYTES, MAX_HANDED, socket.MSG_CMSG_CLOEXEC)
        if not data:
            return False
        message = json.loads(data)
        sys.stdout.flush()  # or the worker would say again what a recipe's import said
        sys.stderr.flush()
        zygote_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._send({"kind": "failed", "number": message["number"], "reason": str(error)})
        else:
            if pid == 0:
                self._become_worker(message["places"], fds, zygote_pid)
            pidfd = os.pidfd_open(pid)
            self._watch(pidfd, message["number"], pid)
            self._send({"kind": "forked", "number": message["number"], "pid": pid}, pidfd)
        for fd in fds:
            os.close(fd)
        return True

    def _require_fit(self) -> None:
        """Begin again if the recipe's source is not what was imported, or its import has started something since."""
        recipe = self.plan.recipe
        if recipe is None:
            return
        reason = unfit()
        if reason:
            self._begin_again(replace(self.plan, recipe=None), f"workers import recipe {recipe} themselves: {reason}")
        try:
            digest = _imported_digest(recipe, self.plan.folder)
        except Exception:
            digest = ""
        if digest != self._maybe_digest:
            self._begin_again(self.plan, f"the source of recipe {recipe} changed: it is imported again")

    def _become_worker(self, places: Mapping[str, Any], fds: list[int], zygote_pid: int) -> NoReturn:
        code = 1
        try:
            die_with(zygote_pid)
            self._socket.close()
            for pidfd in self._workers:
                os.close(pidfd)
            for number in STOP_SIGNALS:
                signal.signal(number, _leave_to_the_agent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            _rename()
            _renew_randomness()
            order = read_document(fds[0])
            order.update({name: _at(place, fds) for name, place in places.items()})
            code = _entry(self.plan.entry)(order)
        except SystemExit as error:
            code = _exit_code(error)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 0xFF)  # nothing that the zygote left for its own end

    def _watch(self, pidfd: int, number: str, pid: int) -> None:
        self._workers[pidfd] = (number, pid)
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _reap(self, pidfd: int) -> None:
        number, pid = self._workers.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._send({"kind": "ended", "number": number, "code": os.waitstatus_to_exitcode(status)})

    def _send(self, message: Mapping[str, Any], *fds: int) -> None:
        socket.send_fds(self._socket, [json.dumps(message).encode()], fds)


def _imported_digest(recipe: str, folder: str) -> str:
    """Import the recipe, if it is not yet, and digest its source as it is now: where it is named, and where it is."""
    from training.sources import import_recipe, module_closure_digest

    importlib.invalidate_caches()
    modules = (recipe.split(":")[0], import_recipe(recipe, folder).__module__)
    return ",".join(map(module_closure_digest, modules))


def _warm_store() -> None:
    from training.runs.job import location_from
    from training.s3.clients import read_api_ahead
    from training.s3.objectstore import shared_store

    try:
        if location := location_from(os.environ):
            shared_store(location).prepare()
        else:
            read_api_ahead()
    except Exception as error:  # the workers will say so, each for itself
        log.warning("clients of the store are not prepared: %s", error)


def _prepare_documents() -> None:
    """What a worker parses on its way to the first step: to learn how takes 5 ms each."""
    from training.cluster.worker import WorkerOrder
    from training.control import Note, Order
    from training.data.manifest import Manifest
    from training.documents import prepare_to_parse
    from training.memory.slots import Header
    from training.memory.transfer import Parcel
    from training.runs.events import Entry
    from training.runs.job import Job
    from training.runs.record import Record

    prepare_to_parse(Entry, Header, Job, Manifest, Note, Order, Parcel, Record, WorkerOrder)


def _entry(name: str) -> Callable[[dict[str, Any]], int]:
    module, _, function = name.partition(":")
    found: Callable[[dict[str, Any]], int] = getattr(importlib.import_module(module), function)
    return found


def _at(place: int | list[int], fds: list[int]) -> int | list[int]:
    return fds[place] if isinstance(place, int) else [fds[number] for number in place]


def _exit_code(error: SystemExit) -> int:
    """As the interpreter does it."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _renew_randomness() -> None:
    """Python's own generator is renewed by the fork; torch's begins alike in every process, and the loop seeds it."""
    import multiprocessing

    import numpy as np

    np.random.seed()
    multiprocessing.current_process().authkey = os.urandom(32)


def _leave_to_the_agent(number: int, frame: FrameType | None) -> None:
    """Not SIG_IGN, which what a worker executes would inherit."""


def _rename() -> None:
    """In lists of processes a worker is called what it is: the command line's memory is written over."""
    old, new = (name.encode() + b"\0" for name in (MODULE, WORKER_MODULE))
    with suppress(OSError, ValueError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start = int(fields[45])  # arg_start
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start + Path("/proc/self/cmdline").read_bytes().index(old))
            memory.write(new)


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    plan = parse(Plan, read_document(int(sys.argv[1])))  # parsing is what imports all of pydantic
    die_with(plan.agent_pid)
    with suppress(BrokenPipeError, ConnectionResetError):  # the agent is gone
        Server(plan).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
