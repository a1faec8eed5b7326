"""A process that computes: `python -m tasks.serving.replica FD FRONT`. It dies with its front.

One thread reads requests and checks them, one loads programs, and the main one computes, batch by batch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import orjson

from tasks.lifecycle.model_file import Signature
from tasks.serving.batching import Request, Waiting
from tasks.serving.computing import Computed, compute
from tasks.serving.frames import Frame, packed, receive
from tasks.serving.program import Program, load, prepare
from tasks.serving.requests import BadRequestError, array_of
from training.documents import parse
from training.errors import DamagedError
from training.processes import die_with


def main() -> None:
    descriptor, front = map(int, sys.argv[1:])
    die_with(front)
    threading.excepthook = end_with_it
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a terminal or service manager tells all, but the front drains first
        signal.signal(number, signal.SIG_IGN)
    prepare()
    Replica(socket.socket(fileno=descriptor)).run()


def end_with_it(told: threading.ExceptHookArgs) -> None:
    """A replica that has lost a thread would be silent; one that has ended is replaced."""
    threading.__excepthook__(told)
    os._exit(1)


class Replica:
    """Answers its front until that closes the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._programs: dict[str, Program] = {}
        self._waiting = Waiting()
        self._loads: SimpleQueue[Frame] = SimpleQueue()
        self._one_writes = threading.Lock()

    def run(self) -> None:
        threading.Thread(target=self._read, name="read", daemon=True).start()
        threading.Thread(target=self._load_all, name="load", daemon=True).start()
        while True:
            for computed in compute(self._waiting.take()):
                self._give(computed)

    def _read(self) -> None:
        stream = self._connection.makefile("rb")
        while (frame := receive(stream)) is not None:
            if frame.head["do"] == "predict":
                self._check(frame)
            else:
                self._loads.put(frame)
        os._exit(0)

    def _load_all(self) -> None:
        """In order: a version that was dropped while it was loaded is dropped afterwards."""
        while True:
            frame = self._loads.get()
            if frame.head["do"] == "load":
                self._load(frame)
            else:
                self._programs.pop(frame.head["identity"], None)

    def _load(self, frame: Frame) -> None:
        told = frame.head
        try:
            program = load(
                Path(told["path"]).read_bytes(),
                version=told["version"],
                sha256=told["sha256"],
                signature=parse(Signature, told["signature"]),
            )
        except (DamagedError, OSError) as error:  # the front closes a file that nobody wants any more
            self._answer(frame.number, {"refused": str(error)})
            return
        self._programs[told["identity"]] = program
        self._answer(frame.number, {"ready": True})

    def _check(self, frame: Frame) -> None:
        program = self._programs[frame.head["identity"]]
        try:
            inputs = array_of(frame.body, program.signature.inputs)
        except BadRequestError as error:
            self._fail(frame.number, 400, str(error))
            return
        self._waiting.put(Request(frame.number, program, inputs))

    def _give(self, computed: Computed) -> None:
        request = computed.request
        if computed.failure:
            self._fail(request.number, 500, computed.failure)
            return
        body = orjson.dumps(
            {"predictions": np.ascontiguousarray(computed.outputs), "model_version": request.program.version},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        head = {"status": 200, "rows": request.num_rows, "batch_rows": computed.batch_rows}
        self._answer(request.number, head, body)

    def _fail(self, number: int, status: int, message: str) -> None:
        code = "BAD_REQUEST" if status == 400 else "INTERNAL_ERROR"
        self._answer(number, {"status": status}, orjson.dumps({"error_code": code, "message": message}))

    def _answer(self, number: int, head: dict[str, Any], body: bytes = b"") -> None:
        with self._one_writes:
            self._connection.sendall(packed(number, head, body))


if __name__ == "__main__":
    main()
